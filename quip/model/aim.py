"""The turns that a block is observed in, and what its matrices are handed of each.

A block is observed once, before any of its matrices is touched. Where targets make up for errors
of the inputs (quip.matrix.target), each group is observed in a turn of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from quip.errors import UsageError
from quip.matrix.hessian import Hessian, Observed
from quip.matrix.paired import Paired
from quip.model.block import Block
from quip.model.moments import Aim
from quip.model.sensitivity.found import Sensitivity
from quip.model.team import Team
from quip.model.twin import Twin

AUTO = "auto"
PART = 10  # of the windows, one of so many is held out
LEAST = 2  # windows that are held out


@dataclass(frozen=True)
class Shrink:
    """How much of what outputs lack their targets make up for; windows that this is chosen by."""

    alpha: float | None = None  # None: the best for each matrix, on the windows held out
    held: frozenset[int] | None = None  # of this process, by its own numbers

    @property
    def share(self) -> float:
        """How far towards the original's outputs a block is tuned: all the way without an alpha."""
        return 1.0 if self.alpha is None else self.alpha

    @classmethod
    def of(
        cls, shrink: float | str | None, count: int, batch_size: int, team: Team
    ) -> "Shrink | None":
        """What --target_shrink says of a walk over so many windows; None: targets are the weights.

        Raises UsageError for other shares, and where there are too few windows to hold some out.
        """
        if not shrink:
            return None
        if isinstance(shrink, int | float):
            if not 0 <= shrink <= 1:
                raise UsageError(f"target_shrink {shrink}: a number from 0 to 1 is needed, or auto")
            return cls(shrink)
        if count < 2 * LEAST:
            raise UsageError(
                f"--target_shrink {shrink} with {count} windows: {LEAST} of at least {2 * LEAST} "
                "are held out; give more (--nsamples), or say a number"
            )
        most = max(LEAST, count // PART)
        step = count // most
        numbers = range(step - 1, step * most, step)
        own = team.share(torch.arange(count), batch_size).tolist()
        return cls(held=frozenset(i for i, number in enumerate(own) if number in numbers))


def turns(
    block: Block,
    shrink: Shrink | None,
    weights: Sequence[Sensitivity | None],
    *,
    all_experts: bool,
) -> Iterator[list[dict[str, Observed]]]:
    """What is seen of the inputs of matrices, by name; each time of those that are quantized next.

    That is one for each of these weights of tokens, of which the last are None: all alike. With a
    shrink the block is that of a paired walk.
    """
    if shrink is None or not isinstance(block, Twin):
        yield block.observe_each(weights, all_experts=all_experts)
        return
    for names in block.groups():
        yield block.observe_lacking(
            *(names, shrink.held), weights=weights[0], all_experts=all_experts
        )


def aim_of(sums: Hessian, shrink: Shrink | None) -> Aim | None:
    """At what targets the matrices of an input are rounded, by its sums; None: at their weights."""
    if shrink is None or not isinstance(sums, Paired):
        return None
    alpha = sums.held.lack() if sums.held else shrink.alpha
    assert alpha is not None
    return Aim(sums.lack(), alpha)
