"""Packed trellis codes on tiles with an order: the kernel against the reference."""

import pytest
import torch

from quip.codebooks.trellis_codes import code
from quip.kernels import trellis_matvec
from quip.kernels.bits import pack
from quip.kernels.trellis import ORDERS, Code, Tiling
from quip.kernels.trellis_matvec import reference, squares

CPU = torch.device("cpu")
MMA = ORDERS["mma"]
needs_compiler = pytest.mark.skipif(not squares.FORM.available(), reason="no C++ compiler here")


def problem(m: int, n: int, bits: int, L: int = 16, order: tuple[int, ...] = MMA):
    """Packed codes, the code, a scale and the tiling."""
    rng = torch.Generator().manual_seed(bits)
    words = pack(torch.randint(2**bits, (m, n), generator=rng), bits)
    book = code("mcg", bits, L, CPU)
    return words, book, torch.tensor([0.25 + 0.1 * bits]), Tiling(m // 16, 16, order)


SIZES = [(16, 16), (32, 128), (48, 208)]  # one tile, whole panels, a panel that is cut short


@needs_compiler
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_a_decoded_matrix_is_that_of_the_reference_bit_for_bit(m, n, bits):
    for L in (10, 16):
        known = problem(m, n, bits, L)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            options = {"n": n, "group": None, "dtype": dtype}
            expected = reference.decode_words(*known, **options)
            assert trellis_matvec.decode.chosen(*known, **options) is squares.decode
            assert torch.equal(trellis_matvec.decode(*known, **options), expected)


@needs_compiler
@pytest.mark.parametrize("bits", [1, 2, 3, 6, 8])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_products_are_those_with_the_decoded_matrix(m, n, bits):
    known = problem(m, n, bits)
    W = reference.decode_words(*known, n=n, group=None, dtype=torch.float64)
    for batch in ((), (1,), (5,), (2, 8)):
        x = torch.randn(*batch, n, generator=torch.Generator().manual_seed(3))
        options = {"group": None, "dtype": torch.bfloat16}
        assert trellis_matvec.multiply.chosen(x, *known, **options) is squares.multiply
        y = trellis_matvec.multiply(x, *known, **options)
        assert (y.dtype, y.shape) == (torch.float32, (*batch, m))
        # Noise of float32 in sums of n products: x is not rounded to bfloat16.
        size = (x.double().abs() @ W.abs().T).max()
        assert float((y - x.double() @ W.T).abs().max() / size) < 3e-7


@needs_compiler
def test_many_vectors_meet_a_decoded_matrix_and_gradients_pass():
    known = problem(32, 48, 3)
    x = torch.randn(2, 20, 48, requires_grad=True)
    options = {"group": None, "dtype": torch.bfloat16}
    assert trellis_matvec.multiply.chosen(x, *known, **options) is squares.multiply_decoded
    y = trellis_matvec.multiply(x, *known, **options)
    assert torch.equal(y, reference.multiply(x, *known, **options))
    y.sum().backward()
    W = reference.decode_words(*known, n=48, group=None, dtype=torch.bfloat16)
    torch.testing.assert_close(x.grad[0, 0], W.float().sum(0), rtol=2**-7, atol=0.02)


@needs_compiler
def test_the_state_goes_through_a_tile_in_any_order():
    """Alike in another order, which the kernel is told and does not know."""
    order = tuple(reversed(range(256)))
    known = problem(32, 64, 4, order=order)
    options = {"n": 64, "group": None, "dtype": torch.float32}
    expected = reference.decode_words(*known, **options)
    assert torch.equal(squares.decode(*known, **options), expected)
    other = squares.decode(*problem(32, 64, 4), **options)
    assert not torch.equal(other, expected)


@needs_compiler
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_rows_of_tiles(threads):
    known, x = problem(16 * 9, 512, 2), torch.randn(2, 512)
    options = {"group": None, "dtype": torch.float32}

    def both() -> torch.Tensor:
        W = squares.decode(*known, n=512, **options)
        return torch.cat([W, squares.multiply(x, *known, **options).T], 1)

    alone = both()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(both(), alone)
    finally:
        torch.set_num_threads(1)


def test_what_the_kernel_does_not_read_goes_another_way():
    words, book, scale, tiling = problem(32, 32, 2)
    options = {"n": 32, "group": None, "dtype": torch.float32}

    def chosen(words=words, book=book, scale=scale, tiling=tiling, **changes: object) -> bool:
        form = trellis_matvec.decode.chosen(words, book, scale, tiling, **{**options, **changes})
        return form is squares.decode

    assert chosen() == squares.DECODE.available()
    assert not chosen(tiling=Tiling(2, 16))
    assert not chosen(scale=torch.ones(2), group=16)
    assert not chosen(tiling=Tiling(1, 16, tiling.order))
    assert not chosen(book=Code("table", 2, torch.randn(64, 2)))
