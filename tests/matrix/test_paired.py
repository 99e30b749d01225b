"""Sums of e x^T are bitwise the same in any order and grouping, and near what they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quip.matrix.hessian import anchors_of, squares
from quip.matrix.paired import INPUT, Paired

SIZES = {"a": (9, 20), "b": (5, 20)}


def units(count: int, seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """x and e of batches of two windows, whose sizes and channels differ; the first is largest."""
    rng = torch.Generator().manual_seed(seed)
    sizes = 10 ** (-6 * torch.rand(count, generator=rng))
    sizes[0] = 1
    scales = {key: 10 ** (4 * torch.rand(n, generator=rng) - 2) for key, n in widths().items()}
    found = []
    for size in sizes:
        draw = {
            key: size * scale * torch.randn(2, 6, len(scale), generator=rng)
            for key, scale in scales.items()
        }
        found.append((draw.pop(INPUT), draw))
    return found


def widths() -> dict[str, int]:
    return {INPUT: 20} | {name: m for name, (m, _) in SIZES.items()}


def anchors(first: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
    seen = {INPUT: first[0], **first[1]}
    return {key: anchors_of(squares(x.flatten(0, -2))) for key, x in seen.items()}


def summed(seen: list, known: dict[str, Tensor], *, exact: bool = True) -> Paired:
    found = Paired(SIZES, anchors=known if exact else {}, holds_out=True, exact=exact)
    for x, lacking in seen:
        found.add(x, lacking, [1])
    return found


def bits(paired: Paired) -> list[Tensor]:
    """The sums of all tokens and of those held out."""
    parts = [paired, paired.held]
    sums = [cross._sums for part in parts for cross in part.crosses.values()]
    return [*sums, *(part._lower.tril() for part in parts)]


@given(seed=st.integers(0, 99), order=st.permutations(range(6)), data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_order_and_any_grouping_of_units_gives_the_same_bits(seed, order, data):
    seen = units(6, seed)
    known = anchors(seen[0])
    alone = summed(seen, known)
    groups: list[list] = [[] for _ in range(3)]
    for i in order:
        groups[data.draw(st.integers(0, 2))].append(seen[i])
    first, *others = [summed(group, known) for group in groups]
    for other in others:
        held: list[Tensor] = []
        other.reduce(lambda x, held=held: held.append(x.clone()))
        first.reduce(lambda x, held=held: x.add_(held.pop(0)))
    for found, expected in zip(bits(first), bits(alone), strict=True):
        assert torch.equal(found, expected)


def test_sums_that_are_not_rounded_do_depend_on_the_order():
    seen = units(30, seed=1)
    one, other = (summed(order, {}, exact=False) for order in (seen, seen[::-1]))
    assert not torch.equal(one.crosses["a"]._sums, other.crosses["a"]._sums)


@pytest.mark.parametrize("exact", [True, False])
def test_means_are_those_of_all_tokens_and_of_those_held_out(exact):
    seen = units(6, seed=2)
    found = summed(seen, anchors(seen[0]), exact=exact)
    for part, rows in ((found, slice(None)), (found.held, slice(1, 2))):
        x = torch.cat([x[rows] for x, _ in seen]).double().flatten(0, 1)
        lack = part.lack()
        assert lack.count == len(x)
        scale = x.square().mean(0).sqrt()
        for name, C in lack.C.items():
            e = torch.cat([e[name][rows] for _, e in seen]).double().flatten(0, 1)
            error = (C - e.T @ x / len(x)) / torch.outer(e.square().mean(0).sqrt(), scale)
            assert error.abs().max() < 1e-6  # products in float32
        error = (lack.H.double() - x.T @ x / len(x)) / torch.outer(scale, scale)
        assert error.abs().max() < 1e-6


def test_what_another_process_has_is_let_go_of():
    seen = units(2, seed=3)
    found = summed(seen, anchors(seen[0]))
    found.forget()
    assert {len(x) for x in bits(found)} == {0}
