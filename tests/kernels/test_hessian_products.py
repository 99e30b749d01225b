"""Second moments on tensor cores: the panels of the form for CUDA, multiplied by the CPU."""

from collections.abc import Callable

import pytest
import torch

from quip.kernels.hessian import add_products, cuda, reference

SIZES = [1, 63, 64, 65, 1023, 1024, 1025, 2100]  # about and across the panels of both


@pytest.fixture
def products(monkeypatch):
    """The sizes of the products that are asked of the tensor cores, which the CPU does instead."""
    done = []

    def multiply(A, B):
        done.append((*A.shape, B.shape[1]))
        return A.float() @ B.float()

    monkeypatch.setattr(cuda, "multiply", multiply)
    return done


Sums = tuple[torch.Tensor, torch.Tensor]


def added(
    add: Callable[..., torch.Tensor], x: torch.Tensor, anchors: torch.Tensor | None = None
) -> Sums:
    """Sums on and below their diagonal, and the squares that were given back."""
    rng = torch.Generator().manual_seed(1)
    sums = torch.randn(x.shape[1], x.shape[1], generator=rng, dtype=torch.float64).to(x.device)
    squares = add(sums, x, anchors)
    return sums.tril(), squares


def both(n: int, dtype: torch.dtype, anchors: torch.Tensor | None = None) -> tuple[Sums, Sums]:
    """What the reference and the form for CUDA make of the same tokens and the same sums before."""
    x = torch.randn(9, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    forms = (reference.add_products, cuda.add_products)
    first, second = (added(add, x, anchors) for add in forms)
    return first, second


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", cuda.HALVES)
def test_panels_on_tensor_cores_are_the_reference(products, n, dtype):
    expected, found = both(n, dtype)
    # Sums of nine products in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert {(k, len(products)) for _, k, _ in products} == {(9, -(-n // cuda.BLOCK))}


@pytest.mark.parametrize("n", [1, 65, 1025])
def test_every_panel_is_rounded_to_multiples_of_its_anchors(products, n):
    anchors = 2.0 ** torch.arange(n, dtype=torch.float64).remainder(9)
    plain, rounded = both(n, torch.bfloat16), both(n, torch.bfloat16, anchors)
    for (found, squares), (unrounded, same) in zip(rounded, plain, strict=True):
        start = added(lambda sums, x, anchors: sums.diagonal(), torch.empty(0, n))[0]
        step = torch.outer(reference.QUANTUM * anchors, anchors)
        # The sums before are no multiples: what was added is known up to the digits of sums.
        steps = (found - start) / step
        assert bool(((steps - steps.round()).tril().abs() * step <= 1e-14).all())
        assert bool(((found - unrounded).abs() <= step / 2 + 1e-14).all())
        assert torch.equal(squares, same)


def test_little_more_than_half_of_the_products_is_computed(products):
    n = 4 * cuda.BLOCK
    cuda.add_products(torch.zeros(n, n, dtype=torch.float64), torch.ones(1, n).bfloat16())
    assert sum(m * k * columns for m, k, columns in products) == n * n * 5 / 8


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_found_on_the_diagonal(products, value):
    x = torch.ones(5, 70).half()
    x[3, 66] = value
    found, squares = added(cuda.add_products, x)
    for diagonal in (found.diagonal(), squares):
        assert diagonal.isfinite().logical_not().nonzero().tolist() == [[66]]


def test_the_cpu_and_wide_inputs_are_the_references():
    sums = torch.zeros(3, 3, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.ones(2, 3, dtype=dtype)
        assert add_products.chosen(sums, x) is reference.add_products


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", cuda.HALVES)
def test_tensor_cores_are_as_exact_as_float32(dtype):
    assert cuda.FORM.available()
    x = torch.randn(8192, 1500, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    x = (x + 0.5).to(dtype)
    expected = x.double().T @ x.double()
    for add in (reference.add_products, cuda.add_products):
        found = torch.zeros_like(expected)
        squares = add(found, x, torch.full_like(expected[0], 128.0))
        # 8192 products in float32, of which each order of sums loses some 1e-6.
        assert (found - expected).tril().abs().max() < 1e-5 * expected.max()
        assert (squares - expected.diagonal()).abs().max() < 1e-5 * expected.max()
