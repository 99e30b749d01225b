"""Second moments on tensor cores: the panels of the form for CUDA, multiplied by the CPU."""

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


def both(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference and the form for CUDA make of the same tokens and the same sums before."""
    rng = torch.Generator().manual_seed(n)
    x = torch.randn(9, n, generator=rng).to(dtype)
    sums = torch.randn(n, n, generator=rng, dtype=torch.float64)
    return tuple(add(sums.clone(), x) for add in (reference.add_products, cuda.add_products))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", cuda.HALVES)
def test_panels_on_tensor_cores_are_the_reference(products, n, dtype):
    expected, found = both(n, dtype)
    # Sums of nine products in float32.
    torch.testing.assert_close(found.tril(), expected.tril(), rtol=1e-5, atol=1e-5)
    assert {(k, len(products)) for _, k, _ in products} == {(9, -(-n // cuda.BLOCK))}


def test_little_more_than_half_of_the_products_is_computed(products):
    n = 4 * cuda.BLOCK
    cuda.add_products(torch.zeros(n, n, dtype=torch.float64), torch.ones(1, n).bfloat16())
    assert sum(m * k * columns for m, k, columns in products) == n * n * 5 / 8


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_found_on_the_diagonal(products, value):
    x = torch.ones(5, 70).half()
    x[3, 66] = value
    found = cuda.add_products(torch.zeros(70, 70, dtype=torch.float64), x)
    assert found.diagonal().isfinite().logical_not().nonzero().tolist() == [[66]]


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
        found = add(torch.zeros_like(expected), x).tril()
        # 8192 products in float32, of which each order of sums loses some 1e-6.
        assert (found - expected.tril()).abs().max() < 1e-5 * expected.max()
