"""Groups of a block's matrices, dealt to the processes of a team by what they cost.

A group are the matrices of one input. Its owner gets the second moments that all have seen, and
rounds; what comes of it is put in its place everywhere.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import torch

from quip.matrix.hessian import Hessian, Observed
from quip.matrix.recipe import Recipe
from quip.model.block_module import BlockModule
from quip.model.moments import Moments
from quip.model.parts import packed_parts, put_parts
from quip.model.records import MatrixRecord, record_of
from quip.model.siblings import quantize_siblings
from quip.model.team import Team

Group: TypeAlias = Sequence[str]  # full dotted names
ROUNDING = 512  # multiply-adds that it takes to round a weight, beside what feedback takes
SEARCH = 2**16  # and where a tile of weights is searched for a walk on a trellis


def rounds(
    groups: Sequence[Group], hessians: Mapping[str, Observed], team: Team, *, one_by_one: bool
) -> Iterator[list[Group]]:
    """The groups in their order, those together that are quantized at the same time.

    Moments that are at hand are dealt out all at once; others are summed up when their turn comes,
    two for each process: the matrices of an expert differ in what they cost.
    """
    most = 1 if one_by_one or team.size == 1 else len(groups)
    together: list[Group] = []
    for names in groups:
        at_hand = isinstance(hessians[names[0]], Hessian)
        if len(together) >= (most if at_hand else min(most, 2 * team.size)) or (
            together and at_hand != isinstance(hessians[together[0][0]], Hessian)
        ):
            yield together
            together = []
        together.append(names)
    if together:
        yield together


@dataclass(frozen=True)
class Deal:
    """Groups of a block that are quantized at the same time, and the owner of each by its rank."""

    block: BlockModule
    groups: Sequence[Group]
    owners: Mapping[str, int]  # by the first name of a group
    team: Team

    @classmethod
    def of(
        cls,
        block: BlockModule,
        groups: Sequence[Group],
        recipes: Mapping[str, Recipe],
        team: Team,
    ) -> "Deal":
        """The dearest group first, each to the process that has least to do by then."""
        costs = {names[0]: _cost(block, names, recipes) for names in groups}
        return cls(block, groups, team.owners(costs), team)

    def totals(self, hessians: Mapping[str, Observed]) -> dict[str, Hessian]:
        """What all processes have seen of the inputs of the groups that this one owns."""
        found = {}
        for name, owner in self.owners.items():
            hessian = hessians[name].summed()
            self.team.total(hessian, owner)
            if owner == self.team.rank:
                hessian.finish()
                found[name] = hessian
        return found

    def quantize(
        self,
        moments: Callable[[Group], Moments],
        recipes: Mapping[str, Recipe],
        seed: int,
    ) -> Iterator[MatrixRecord]:
        """Quantize the groups in place, each by its owner; records are in the order of groups.

        `moments` are asked of an own group when its turn comes. Alone, each record comes as soon
        as its matrix is there.
        """
        found: dict[str, list[MatrixRecord]] = {}
        for names in self.groups:
            if self.owners[names[0]] == self.team.rank:
                records = quantize_siblings(self.block, names, moments(names), recipes, seed)
                if self.team.size == 1:
                    yield from records
                else:
                    found[names[0]] = list(records)
        for names in self.groups if self.team.size > 1 else ():
            yield from self._spread(names, found.get(names[0], []))

    @torch.no_grad()
    def _spread(self, names: Group, records: Sequence[MatrixRecord]) -> list[MatrixRecord]:
        """Put everywhere what the owner made of these matrices; returns its records."""
        block, owner = self.block, self.owners[names[0]]
        own = [name.removeprefix(f"{block.name}.") for name in names]
        mine = self.team.rank == owner
        layout, tensors = packed_parts(block.module, own) if mine else ({}, {})
        words = layout, [asdict(record) for record in records]
        (layout, said), tensors = self.team.spread(words, tensors, owner, device=block.device)
        if not mine:
            put_parts(block.module, layout, tensors)
        return [record_of(MatrixRecord, each) for each in said]


def _cost(block: BlockModule, names: Group, recipes: Mapping[str, Recipe]) -> float:
    """Multiply-adds: m n^2 of feedback, n^3 / 3 of a factorisation, and more for each weight."""
    found = block.matrices()
    n = found[names[0]].columns
    each = (SEARCH if recipes[name].codebook.rows > 1 else ROUNDING for name in names)
    weights = [found[name].rows * n for name in names]
    return sum(m * (n + more) for m, more in zip(weights, each, strict=True)) + n**3 / 3
