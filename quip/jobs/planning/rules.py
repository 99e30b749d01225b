"""Plans without a measurement: one width for all, or rules of thumb.

What every model's measurements have in common (SmolLM2-135M: v costs 6 times, k 2.6 times the mean
damage per weight; the first and last block 1.5 and 2.3 times), and llama.cpp's rule for down
projections, as steps that are taken in turn while the budget lasts:

    1   k and v one bit up           of small matrices, where heads share them
    2   the first and last block one bit up
    3   v one more bit up
    4   down projections one bit up in the first and last eighth of blocks, and in every third
    5   any matrix one choice up, blocks at the ends first, v and k before the others
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quip.jobs.planning.choices import Group

KEYS, VALUES = ("k_proj", "key", "k"), ("v_proj", "value", "v")
DOWN = ("down_proj", "fc2", "dense_4h_to_h")


@dataclass(frozen=True)
class _Rule:
    takes: Callable[[Group, int], bool]  # a group, of a model of so many blocks
    more: int = 1  # bits; 0: the next choice


def uniform(groups: Sequence[Group], budget: int) -> list[int]:
    """The widest choice that all can have within the budget, in bits; at least the narrowest.

    A group that does not have it has its own next below.
    """
    widths = sorted({choice.width for group in groups for choice in group.choices})
    found = [0] * len(groups)
    for width in widths:
        wider = [
            max([i for i, choice in enumerate(group.choices) if choice.width <= width] or [0])
            for group in groups
        ]
        if total(groups, wider) <= budget:
            found = wider
    return found


def by_rules(groups: Sequence[Group], budget: int) -> list[int]:
    """The widest uniform choice, and then more bits by the rules above while the budget lasts."""
    chosen, blocks = uniform(groups, budget), 1 + max(group.block for group in groups)
    left = budget - total(groups, chosen)
    ends = sorted(range(len(groups)), key=lambda i: _from_the_ends(groups[i], blocks))
    for rule in RULES:
        for index in ends:
            group, old = groups[index], chosen[index]
            new = _raised(group, old, rule.more) if rule.takes(group, blocks) else old
            cost = group.bits[new] - group.bits[old]
            if cost <= left:
                chosen[index], left = new, left - cost
    return chosen


def total(groups: Sequence[Group], chosen: Sequence[int]) -> int:
    """The bits of all groups."""
    return sum(group.bits[index] for group, index in zip(groups, chosen, strict=True))


def _raised(group: Group, old: int, more: int) -> int:
    """The narrowest choice of at least so many bits more, or the widest."""
    wanted = group.choices[old].width + more
    wider = [i for i, choice in enumerate(group.choices) if i > old and choice.width >= wanted]
    return min(wider, default=len(group.choices) - 1)


def _is(group: Group, kinds: Sequence[str]) -> bool:
    return any(kind in kinds for kind in group.kind.split("+"))


def _from_the_ends(group: Group, blocks: int) -> tuple[int, int, int]:
    apart = min(group.block, blocks - 1 - group.block)
    return apart, 0 if _is(group, VALUES) else 1 if _is(group, KEYS) else 2, group.block


def _more_bits(block: int, blocks: int) -> bool:
    """llama.cpp's choice of blocks (use_more_bits in llama-quant)."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


RULES = (
    _Rule(lambda group, _: _is(group, (*KEYS, *VALUES))),
    _Rule(lambda group, blocks: group.block in (0, blocks - 1)),
    _Rule(lambda group, _: _is(group, VALUES)),
    _Rule(lambda group, blocks: _is(group, DOWN) and _more_bits(group.block, blocks)),
    _Rule(lambda *_: True, more=0),
)
