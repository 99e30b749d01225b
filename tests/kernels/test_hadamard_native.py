"""kernels/hadamard/cpu.cpp against the dense product, in every layout that it tells apart."""

import math

import pytest
import torch
from torch import Tensor

from quip.errors import UsageError
from quip.kernels.hadamard import cpu, invert, invert_rows, rotate, rotate_rows
from quip.kernels.hadamard.matrices import factors, matrix
from tests.laws import assert_near

pytestmark = pytest.mark.skipif(not cpu.FORM.available(), reason="no C++ compiler")

# Of the largest entry: sums of up to 11008 numbers, made in some 10 to 60 steps.
NOISE = {torch.float32: 3e-6, torch.float64: 1e-14}
WIDTHS = [
    *[(2**p, None) for p in (0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14)],
    *[(n, None) for n in (12, 24, 36, 60, 576, 960, 1536, 3072, 11008)],
    *[(96, 8), (96, 12), (96, 48), (7, 1), (4096, 64), (1536, 768)],
]


def dense(x: Tensor, block: int | None = None, *, transpose: bool = False) -> Tensor:
    """Omega x in float64: K as one dense product, S as one for each of its 2 x 2 factors."""
    width = block or x.shape[-1]
    *outer, last = factors(width)
    (order,) = outer or (1,)
    K = matrix(order).double()
    X = (K.T if transpose else K) @ x.double().reshape(-1, order, last)
    for bit in range(last.bit_length() - 1):
        X = torch.tensor([[1.0, 1], [1, -1]]).double() @ X.reshape(-1, 2, 2**bit)
    return X.reshape(x.shape) / math.sqrt(width)


def randn(*shape: int, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def check_all(x: Tensor, block: int | None, signs: Tensor) -> None:
    """All four functions, with signs and without, on the rows of x or the columns of x^T."""
    noise, given, columns = NOISE[x.dtype], x.clone(), x.T.contiguous()
    s = signs.double()
    for expected, last, first in (
        (dense(x, block), rotate(x, block=block), rotate_rows(columns, block=block)),
        (
            s * dense(x, block),
            rotate(x, block=block, signs=signs),
            rotate_rows(columns, block=block, signs=signs),
        ),
        (
            dense(x, block, transpose=True),
            invert(x, block=block),
            invert_rows(columns, block=block),
        ),
        (
            dense(s * x.double(), block, transpose=True),
            invert(x, block=block, signs=signs),
            invert_rows(columns, block=block, signs=signs),
        ),
    ):
        assert last.dtype == first.dtype == x.dtype
        assert last.shape == x.shape
        assert first.shape == columns.shape
        assert_near(last.double(), expected, noise)
        assert_near(first.double(), expected.T, noise)
    assert torch.equal(x, given)
    assert torch.equal(columns, given.T)


@pytest.mark.parametrize("dtype", NOISE)
@pytest.mark.parametrize(("n", "block"), WIDTHS)
def test_every_width_is_the_dense_product(rng, dtype, n, block):
    x = randn(5, n, rng=rng, dtype=dtype)
    check_all(x, block, randn(n, rng=rng, dtype=dtype))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 15, 16, 17, 33, 300])
@pytest.mark.parametrize(("n", "block"), [(12, None), (48, None), (48, 24), (576, None), (256, 64)])
def test_any_number_of_rows_and_of_columns_is_served(rng, count, n, block):
    check_all(randn(count, n, rng=rng), block, randn(n, rng=rng))


def test_a_strip_of_columns_ends_anywhere(rng):
    check_all(randn(333, 1536, rng=rng), None, randn(1536, rng=rng))  # 170 are too many for one


@pytest.mark.parametrize("n", [48, 192])
def test_views_are_rotated_as_their_copies_are(rng, n):
    x, signs = randn(2 * n, n, rng=rng), randn(2 * n, rng=rng)[::2]
    for view in (x.T[:, ::2], x[::3], x[0].expand(5, n), x[:, :1].T.expand(3, -1)[:, :n]):
        y = view.contiguous()
        assert torch.equal(rotate(view, signs=signs), rotate(y, signs=signs.contiguous()))
        assert torch.equal(
            rotate_rows(view.T, signs=signs), rotate_rows(y.T.contiguous(), signs=signs)
        )
    assert torch.equal(rotate(x[0]), rotate(x)[0])
    assert_near(rotate(x.view(n, 2, n)), rotate(x).view(n, 2, n), 0.0)


@pytest.mark.parametrize("n", [24, 192])
def test_what_is_not_finite_stays_in_its_row_or_column(rng, n):
    x = randn(40, n, rng=rng)
    x[7, 3] = math.nan
    for y in (rotate(x), invert(x), rotate_rows(x.T).T, invert_rows(x.T).T):
        assert bool(y[7].isnan().all())
        assert bool(y[[*range(7), *range(8, 40)]].isfinite().all())


@pytest.mark.parametrize("block", [None, 12])
@pytest.mark.parametrize("turn", [rotate, invert, rotate_rows, invert_rows])
def test_gradients_of_vectors_and_of_signs_are_those_of_the_formula(rng, turn, block):
    x = randn(24, 24, rng=rng, dtype=torch.float64)[:, :5]
    x = (x if turn in (rotate_rows, invert_rows) else x.T).requires_grad_()
    signs = randn(24, rng=rng, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: turn(x, block=block), x)
    assert torch.autograd.gradcheck(lambda x, s: turn(x, block=block, signs=s), (x, signs))
    assert torch.autograd.gradcheck(lambda s: turn(x.detach(), block=block, signs=s), signs)


def test_gradients_in_float32_agree_with_the_dense_product(rng):
    x, signs = randn(3, 960, rng=rng), randn(960, rng=rng)
    g = randn(3, 960, rng=rng)
    ours, truth = ([t.detach().to(d).requires_grad_() for t in (x, signs)] for d in NOISE)
    rotate(ours[0], signs=ours[1]).backward(g)
    (dense(truth[0]) * truth[1]).backward(g.double())
    for one, other in zip(ours, truth, strict=True):
        assert_near(one.grad.double(), other.grad, NOISE[torch.float32])
    x = x.clone().requires_grad_()
    invert(x).sum().backward()  # a gradient of stride 0
    assert_near(x.grad.double(), dense(torch.ones(3, 960)), NOISE[torch.float32])


def test_without_gradients_the_result_is_the_same_and_carries_none(rng):
    x, signs = randn(3, 48, rng=rng).requires_grad_(), torch.ones(48)
    for turn in (rotate, invert):
        y = turn(x, signs=signs)
        with torch.no_grad():
            assert torch.equal(turn(x, signs=signs), y)
            assert not turn(x, signs=signs).requires_grad
        with torch.inference_mode():
            assert torch.equal(turn(x, signs=signs), y)
        assert y.requires_grad


@pytest.mark.parametrize("turn", [rotate, invert, rotate_rows, invert_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_compiler_changes_nothing_but_noise(rng, monkeypatch, turn, dtype):
    x, signs = randn(96, 96, rng=rng, dtype=dtype), randn(96, rng=rng)
    ours = turn(x, signs=signs)
    monkeypatch.setattr(cpu, "library", lambda source: None)
    theirs = turn(x, signs=signs)
    assert ours.dtype == theirs.dtype == dtype
    rounding = torch.finfo(dtype).eps  # both round the same number but for the noise of float32
    assert_near(ours.float(), theirs.float(), 2e-6 if dtype == torch.float32 else rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(rng, dtype):
    x, signs = randn(7, 576, rng=rng, dtype=dtype), randn(576, rng=rng)
    assert torch.equal(rotate(x, signs=signs), rotate(x.float(), signs=signs).to(dtype))
    assert torch.equal(invert(x, signs=signs), invert(x.float(), signs=signs).to(dtype))
    x.requires_grad_()
    rotate(x).backward(x.detach())
    assert torch.equal(x.grad, invert(x.detach().float()).to(dtype))


def test_the_default_dtype_plays_no_part(rng):
    x, signs = randn(3, 576, rng=rng), randn(576, rng=rng)
    y = rotate(x, signs=signs)
    torch.set_default_dtype(torch.float64)
    try:
        for cached in (matrix, cpu._codes, cpu._plan):
            cached.cache_clear()
        assert torch.equal(rotate(x, signs=signs), y)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_without_a_rotation_are_refused_as_columns_are():
    for call in (rotate_rows, invert_rows):
        with pytest.raises(UsageError, match="no Hadamard rotation of width 7 is known"):
            call(torch.zeros(7, 4))
        with pytest.raises(UsageError, match="block of 8 does not divide the width 12"):
            call(torch.zeros(12, 8), block=8)
