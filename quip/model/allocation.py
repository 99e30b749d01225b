"""Bits where they matter: which option each group of matrices gets, within a budget of bits.

    minimise  sum_g damage_g(option_g)    subject to    sum_g bits_g(option_g) <= budget

Every group starts at its cheapest option. The upgrades along the lower convex hull of its (bits,
damage) are taken in the order of damage saved per bit, over all groups, as far as they fit; what is
left of the budget then goes to whatever saves most. With options of equal widths, damages a_l D(b)
and equal a_l per weight, a budget of one width is that width everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quip.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store a group of matrices."""

    bits: int  # of all that is stored of it
    damage: float  # that it does to the model; only sums over groups are compared


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of the option of each group; their bits never exceed the budget, in bits.

    Raises UsageError, with both ends, for a budget that is below the cheapest options of all groups
    together or above the dearest.
    """
    low, high = (sum(end(o.bits for o in options) for options in groups) for end in (min, max))
    if not low <= budget <= high:
        raise UsageError(
            f"a budget of {budget} bits: the options take {low} to {high}; ask for as many"
        )
    chosen = [min(range(len(g)), key=lambda i: (g[i].bits, g[i].damage)) for g in groups]
    left = budget - low
    for _, group, target in sorted(_steps(groups, chosen), key=lambda step: -step[0]):
        cost = groups[group][target].bits - groups[group][chosen[group]].bits
        if cost <= left:
            left -= cost
            chosen[group] = target
    _spend(groups, chosen, left)
    return chosen


def _steps(
    groups: Sequence[Sequence[Option]], start: Sequence[int]
) -> list[tuple[float, int, int]]:
    """(damage saved per bit, group, option that it leads to): the edges of each group's hull."""
    steps = []
    for group, (options, at) in enumerate(zip(groups, start, strict=True)):
        while better := [i for i, o in enumerate(options) if _improves(options[at], o)]:
            rates = {i: _rate(options[at], options[i]) for i in better}
            best = max(better, key=lambda i: (rates[i], options[i].bits))
            steps.append((rates[best], group, best))
            at = best
    return steps


def _improves(old: Option, new: Option) -> bool:
    return new.bits > old.bits and new.damage < old.damage


def _rate(old: Option, new: Option) -> float:
    return (old.damage - new.damage) / (new.bits - old.bits)


def _spend(groups: Sequence[Sequence[Option]], chosen: list[int], left: int) -> None:
    """Take what saves most of all that still fits, until nothing does."""
    while True:
        best, saved = None, 0.0
        for group, options in enumerate(groups):
            old = options[chosen[group]]
            for index, new in enumerate(options):
                fits = new.bits - old.bits <= left
                if fits and old.damage - new.damage > saved:
                    best, saved = (group, index), old.damage - new.damage
        if best is None:
            return
        group, index = best
        left -= groups[group][index].bits - groups[group][chosen[group]].bits
        chosen[group] = index
