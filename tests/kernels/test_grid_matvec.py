"""Products with packed grids: the kernel and the decoded matrix agree, and who is sent where."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quip.codebooks import Grids, Groups
from quip.kernels import grid_matvec
from quip.kernels.bits import pack
from quip.kernels.grid_matvec import cpu, reference
from quip.kernels.grid_matvec.cpu import FEW
from tests.laws import JoinedPoints, Points, assert_near

needs_compiler = pytest.mark.skipif(not cpu.FORM.available(), reason="no C++ compiler here")


def multiply(x, words, grids, dtype, form=reference.multiply):
    """The product by one form; by torch if none is given."""
    known = {"bits": grids.bits, "group": grids.groups.size, "dtype": dtype}
    return form(x, words, grids.step, grids.zeros, **known)


def multiply_native(x, words, grids, dtype):
    return multiply(x, words, grids, dtype, cpu.multiply)


def chosen(x, words, grids):
    return multiply(x, words, grids, torch.float32, grid_matvec.multiply.chosen)


def problem(m: int, n: int, bits: int, group: int | None, symmetric: bool | str, seed: int = 0):
    """Packed codes and the grids that decode them."""
    rng = torch.Generator().manual_seed(seed)
    groups = Groups(n, group)
    codes = torch.randint(2**bits, (m, n), generator=rng)
    step = torch.rand(1 if symmetric is True else m, groups.count, generator=rng) + 0.1
    zero = torch.randint(2**bits, (m, groups.count), generator=rng, dtype=torch.uint8)
    kind = {"zero": None if symmetric else zero, "signed": symmetric == "signed"}
    grids = Grids(bits=bits, step=step.bfloat16(), groups=groups, **kind)
    return pack(codes, bits), grids


@needs_compiler
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 300),
    bits=st.integers(1, 8),
    group=st.sampled_from([None, 1, 7, 64]),
    symmetric=st.sampled_from([False, True, "signed"]),
    batch=st.sampled_from([(), (1,), (3,), (1, 1), (2, 4)]),
)
def test_the_kernel_is_the_product_with_the_decoded_matrix(m, n, bits, group, symmetric, batch):
    words, grids = problem(m, n, bits, group, symmetric, seed=n)
    x = torch.randn(*batch, n, generator=torch.Generator().manual_seed(m))
    expected = multiply(x.double(), words, grids, torch.float64)
    ours = multiply_native(x, words, grids, torch.float32)
    assert ours.shape == expected.shape
    # Sums of q x and of zero x are taken apart: each is at most 2^bits times the sum of |step x|.
    scale = 2**bits * float(grids.step.max()) * x.abs().sum(-1, keepdim=True).double()
    assert bool(((ours - expected).abs() <= 1e-6 * scale + 1e-30).all())


@needs_compiler
def test_zeros_of_groups_cancel_no_digits():
    words, grids = problem(64, 2048, 4, 32, symmetric=False)
    x = torch.rand(1, 2048, generator=torch.Generator().manual_seed(0))  # all of one sign
    expected = multiply(x.double(), words, grids, torch.float64)
    ours = multiply_native(x, words, grids, torch.float32)
    assert_near(ours.double(), expected, 5e-7)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "bits", "group", "symmetric"),
    [
        *[(50, 2, None, True), (33, 3, 16, False), (576, 4, 1, True), (40, 8, 7, False)],
        *[(50, 4, None, "signed"), (100, 3, 32, "signed")],
    ],
)
def test_weights_are_decoded_to_the_same_bits(n, bits, group, symmetric, dtype):
    words, grids = problem(7, n, bits, group, symmetric)
    x = torch.randn(2, FEW, n)
    expected = multiply(x, words, grids, dtype)
    assert torch.equal(multiply(x, words, grids, dtype, cpu.multiply_decoded), expected)


@needs_compiler
def test_threads_share_the_rows():
    words, grids = problem(300, 1000, 3, None, symmetric=False)
    given = torch.get_num_threads()
    try:
        for x, form in (
            (torch.randn(2, 1000), cpu.multiply),
            (torch.randint(-1, 2, (9, 1000)).float(), cpu.multiply_decoded),  # exact in any order
        ):
            torch.set_num_threads(1)
            expected = multiply(x, words, grids, torch.float32, form)
            torch.set_num_threads(3)
            assert torch.equal(multiply(x, words, grids, torch.float32, form), expected)
    finally:
        torch.set_num_threads(given)


@needs_compiler
def test_strides_of_the_inputs_do_not_matter():
    words, grids = problem(6, 40, 3, 8, symmetric=False)
    x = torch.randn(40, 3).T
    expected = multiply_native(x.contiguous(), words, grids, torch.float32)
    assert torch.equal(multiply_native(x, words, grids, torch.float32), expected)
    turned = words.T.contiguous().T
    assert torch.equal(multiply_native(x, turned, grids, torch.float32), expected)


@needs_compiler
def test_a_few_single_precision_vectors_on_a_cpu_take_the_kernel():
    words, grids = problem(4, 16, 2, None, symmetric=True)
    assert chosen(torch.zeros(FEW, 16), words, grids) is cpu.multiply
    assert chosen(torch.zeros(16), words, grids) is cpu.multiply
    for x in {
        "many": torch.zeros(FEW + 1, 16),
        "double": torch.zeros(1, 16).double(),
        "gradient": torch.zeros(1, 16, requires_grad=True),
    }.values():
        assert chosen(x, words, grids) is cpu.multiply_decoded
    for x in (torch.zeros(0, 16), torch.zeros(1, 16, device="meta")):
        assert chosen(x, words, grids) is reference.multiply
    with torch.no_grad():
        assert chosen(torch.zeros(1, 16, requires_grad=True), words, grids) is cpu.multiply


@pytest.mark.parametrize("tokens", [1, FEW + 1])
def test_grids_multiply_by_the_form_that_is_chosen(tokens):
    words, grids = problem(4, 16, 2, 4, symmetric=False)
    x = torch.randn(tokens, 16)
    expected = multiply(x, words, grids, torch.float32, grid_matvec.multiply)
    assert torch.equal(grids.multiply(words, x, torch.float32), expected)


def test_a_decoder_without_a_form_of_its_own_decodes_and_multiplies():
    rng = torch.Generator().manual_seed(0)
    points = JoinedPoints((Points.random(2, 9),), Groups(8, None))
    codes = torch.randint(2**9, (5, 8), generator=rng)
    x = torch.randn(3, 16, generator=rng)
    ours = points.multiply(pack(codes, 9), x, torch.float32)
    W = points.decode(codes)
    assert torch.equal(ours, x @ W.float().T)
    assert torch.equal(points.dense(pack(codes, 9), 16, torch.bfloat16), W.bfloat16())


def test_without_a_compiler_torch_does_the_work(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda source: None)
    words, grids = problem(4, 16, 2, None, symmetric=True)
    x = torch.randn(1, 16)
    assert chosen(x, words, grids) is reference.multiply
    torch.testing.assert_close(
        multiply(x, words, grids, torch.float32),
        multiply(x.double(), words, grids, torch.float64).float(),
    )


def test_the_product_is_computed_in_the_dtype_asked_for_and_keeps_its_own():
    words, grids = problem(5, 64, 4, 16, symmetric=False)
    x = torch.randn(12, 64)
    exact = multiply(x, words, grids, torch.float32)
    rounded = multiply(x, words, grids, torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    # bfloat16 has 8 bits: each product is off by at most 2^-8 of its size, twice, and the sum once.
    torch.testing.assert_close(
        rounded, exact, rtol=0, atol=float(3 * 2**-8 * exact.abs().max() * 8)
    )
