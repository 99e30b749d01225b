"""Second moments are bitwise the same in any order and grouping of their terms, and near exact."""

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quip.kernels.hessian import QUANTUM, add_rounded
from quip.matrix.hessian import GROWTH, Hessian, anchors_of, outgrown, squares

N = 70  # across the panels of products
SIZES = st.sampled_from([1e-12, 1e-3, 1.0, 1e3])


def units(count: int, seed: int, size: float = 1.0) -> list[Tensor]:
    """Batches of tokens that differ, as their channels do: the first is as large as any.

    Terms of one size would be exact in float64 without any rounding.
    """
    rng = torch.Generator().manual_seed(seed)
    scales = size * 10 ** (6 * torch.rand(N, generator=rng) - 3)
    sizes = 10 ** (-5 * torch.rand(count, generator=rng))
    sizes[0] = 1
    return [x * scales * (torch.randn(9, N, generator=rng) + 0.3) for x in sizes]


def observed(seen: Sequence[Tensor], anchors: Tensor | None = None) -> Hessian:
    hessian = Hessian(N, anchors=anchors)
    for x in seen:
        hessian.update(x)
    return hessian


def together(hessians: Sequence[Hessian]) -> Hessian:
    """What the first becomes, as in a team: one after the other adds its sums to those before."""
    first, *others = hessians
    for other in others:
        held: list[Tensor] = []
        other.reduce(lambda x, held=held: held.append(x.clone()))
        first.reduce(lambda x, held=held: x.add_(held.pop(0)))
    return first


def assert_same_bits(a: Hessian, b: Hessian) -> None:
    assert torch.equal(a._lower.tril(), b._lower.tril())
    assert torch.equal(a._sum, b._sum)
    assert (a.count, a.chunks) == (b.count, b.chunks)


@given(seed=st.integers(0, 99), size=SIZES, order=st.permutations(range(7)), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_order_and_any_grouping_of_units_gives_the_same_bits(seed, size, order, data):
    seen = units(7, seed, size)
    alone = observed(seen)
    groups: list[list[Tensor]] = [[] for _ in range(4)]
    for i in order:
        groups[data.draw(st.integers(0, 3))].append(seen[i])
    assert_same_bits(together([observed(group, alone.anchors) for group in groups]), alone)


def test_sums_that_are_not_rounded_do_depend_on_the_order():
    seen = units(40, seed=1)
    plain = [Hessian(N, exact=False), Hessian(N, exact=False)]
    for x, y in zip(seen, reversed(seen), strict=True):
        plain[0].update(x)
        plain[1].update(y)
    assert not torch.equal(plain[0]._lower, plain[1]._lower)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_sums_are_near_those_without_any_rounding(size):
    seen = units(12, seed=2, size=size)
    hessian = observed(seen)
    assert hessian.anchors is not None
    for i, j in [(0, 0), (69, 0), (69, 69), (40, 17)]:
        # One term at a time, as the sums get them: the products in float32 are not at issue.
        terms = [float(observed([x], hessian.anchors)._lower[i, j]) for x in seen]
        exact = [Hessian(N, exact=False) for _ in seen]
        for h, x in zip(exact, seen, strict=True):
            h.update(x)
        unrounded = math.fsum(float(h._lower[i, j]) for h in exact)
        step = QUANTUM * float(hessian.anchors[i] * hessian.anchors[j])
        assert float(hessian._lower[i, j]) == math.fsum(terms)
        assert abs(float(hessian._lower[i, j]) - unrounded) <= len(seen) * step / 2
        # A hundred-thousandth of what float32 rounds away of terms as large as the first.
        least = float(exact[0].squares.median()) / 16
        first = [max(float(exact[0].squares[k]), least) for k in (i, j)]
        assert step / 2 <= 2**-39 * math.sqrt(first[0] * first[1])


@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=9), power=st.integers(-9, 9)
)
@settings(deadline=None)
def test_a_term_is_rounded_to_the_nearest_multiple_and_ties_to_the_even_one(values, power):
    row, columns = 2.0**power, torch.ones(len(values), dtype=torch.float64)
    P = torch.tensor([values]) * 2.0 ** (power - 20)  # with digits beyond the last that is kept
    sums = torch.zeros(1, len(values), dtype=torch.float64)
    add_rounded(sums, P, torch.tensor([row], dtype=torch.float64), columns)
    step = Fraction(QUANTUM) * Fraction(row)
    for found, value in zip(sums[0].tolist(), P[0].tolist(), strict=True):
        assert Fraction(found) == round(Fraction(value) / step) * step


@given(exponent=st.integers(-200, 200), mantissa=st.floats(1, 2, exclude_max=True))
@settings(deadline=None)
def test_anchors_are_powers_of_two_just_above_the_root(exponent, mantissa):
    value = math.ldexp(mantissa, exponent)
    (d,) = anchors_of(torch.tensor([value], dtype=torch.float64)).tolist()
    assert math.frexp(d)[0] == 0.5
    assert value < d * d <= 4 * value


def test_inputs_that_are_dead_at_first_have_anchors_that_are_not_zero():
    d = anchors_of(torch.tensor([0.0, 4.0, 1.0, 2.0**-9, 16.0]))
    assert d.tolist() == [0.5, 4, 2, 0.5, 8]  # just above the root of a 16th of the median, 1
    assert bool(outgrown(torch.full((3,), 1e-100, dtype=torch.float64), anchors_of(torch.zeros(3))))


@pytest.mark.parametrize("growth", [1.0, 1e4])
def test_sums_that_outgrow_their_anchors_are_exact_with_those_of_the_second_pass(growth):
    seen = [x * growth**i for i, x in enumerate(units(3, seed=3))]
    alone = observed(seen)
    assert alone.anchors is not None
    assert bool(outgrown(alone.squares, alone.anchors)) == (growth > 1)
    parts = [observed(seen[i::2], alone.anchors) for i in range(2)]
    largest = torch.maximum(parts[0].largest, parts[1].largest)
    assert torch.equal(largest, alone.largest)
    anchors = anchors_of(largest, alone.chunks)
    again = observed(seen, anchors)
    assert not outgrown(again.squares, anchors)
    assert_same_bits(together([observed(seen[i::2], anchors) for i in range(2)]), again)


def test_the_second_pass_takes_any_number_of_chunks():
    chunks = int(40 * GROWTH)
    anchors = anchors_of(squares(torch.ones(1, 3)), chunks)
    assert not outgrown(torch.full((3,), float(chunks), dtype=torch.float64), anchors)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_found_as_such_and_spoils_no_other_input(value):
    seen = units(2, seed=4)
    spoilt = [x.index_fill(1, torch.tensor([5]), value) for x in seen]
    found, sound = observed(spoilt), observed(seen)
    assert found.anchors is not None
    assert sound.anchors is not None
    assert not found.is_finite
    assert not outgrown(found.squares, found.anchors)
    assert found._lower.diagonal().isfinite().logical_not().nonzero().tolist() == [[5]]
    rest = torch.arange(N) != 5
    assert torch.equal(found.anchors[rest], sound.anchors[rest])
