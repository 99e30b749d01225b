"""kernels/kronecker: what rotations owe, by any form, and who is sent where."""

import pytest
import torch
from torch import Tensor

from quip.kernels import kronecker
from quip.kernels.kronecker import cpu, operations
from tests.laws import assert_near

needs_compiler = pytest.mark.skipif(not cpu.FORM.available(), reason="no C++ compiler here")
NOISE = 2e-6  # of sums of 65 numbers in float32, of the largest entry
COUNTS = [1, 7, 8, 16, 17, 40]  # vectors: one by one up to half of the lanes, then LANES at a time


def problem(count: int, n: tuple[int, int], rng: torch.Generator) -> tuple[Tensor, ...]:
    """x, two orthogonal matrices and two permutations."""
    p, q = n
    left, right = (torch.linalg.qr(torch.randn(k, k, generator=rng)).Q for k in n)
    x = torch.randn(count, p * q, generator=rng)
    return x, left, right, *(torch.randperm(p * q, generator=rng) for _ in range(2))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("n", [(3, 5), (17, 33), (24, 24)])
def test_a_rotation_is_undone_by_its_transposed_factors(rng, count, n):
    x, left, right, first, last = problem(count, n, rng)
    y = kronecker.rotate(x, left, right, first, last)
    back = left.T.contiguous(), right.T.contiguous(), last.argsort(), first.argsort()
    assert_near(kronecker.rotate(y, *back), x, NOISE)


@needs_compiler
@pytest.mark.parametrize("count", COUNTS)
def test_casts_are_rounded_once(rng, count):
    x, *others = problem(count, (5, 8), rng)
    factors = torch.rand(40, generator=rng), torch.rand(40, generator=rng)
    x = x.bfloat16()
    wide = cpu.rotate_scaled(x, *others, *factors, dtype=torch.float32)
    narrow = cpu.rotate_scaled(x, *others, *factors, dtype=torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16())
    assert torch.equal(wide, cpu.rotate_scaled(x.float(), *others, *factors, dtype=torch.float32))


@needs_compiler
def test_what_is_not_finite_stays_so(rng):
    x, *others = problem(20, (4, 4), rng)
    x[3, 2], x[5, 1] = torch.nan, torch.inf
    for some in (x, x[:6]):
        y = cpu.rotate_scaled(some, *others, None, None, dtype=torch.bfloat16)
        finite = y.isfinite().all(1)
        assert [i for i in range(len(some)) if not finite[i]] == [3, 5]


@needs_compiler
def test_threads_share_the_vectors(rng):
    x, *others = problem(100, (32, 48), rng)
    given = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = cpu.rotate(x, *others)
        torch.set_num_threads(3)
        assert torch.equal(cpu.rotate(x, *others), expected)
    finally:
        torch.set_num_threads(given)


@needs_compiler
def test_gradients_and_other_dtypes_take_torch(rng):
    x, *others = problem(2, (3, 4), rng)
    assert kronecker.rotate.chosen(x, *others) is cpu.rotate
    doubles = [part.double() if part.is_floating_point() else part for part in others]
    for other in ((x.double(), *doubles), (x.requires_grad_(), *others)):
        assert kronecker.rotate.chosen(*other) is kronecker.rotate.reference
    scaled = kronecker.rotate_scaled.chosen(x, *others, None, None, dtype=torch.float32)
    assert scaled is operations.rotate_in_steps
