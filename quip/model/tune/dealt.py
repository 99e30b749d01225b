"""The batches of a step dealt to the processes of a team, their gradients added up as one would.

Sums of floats depend on their order, so each batch's gradient stays apart until it is added in the
order of the step, and any number of processes makes the same steps bit for bit. In a turn every
process has one batch at most; a parameter is cut into as many pieces as there are processes:

    of my batch, all pieces   --exchange-->   of every batch, my piece: added in the step's order
    my piece of the sum       --exchange-->   all pieces of the sum

That moves twice the gradient a turn, as an all-reduce does, which adds in an order of its own.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from quip.model.team import Team

BUCKET = 2**24  # numbers that are exchanged at once, unless one parameter has more
NOTHING = -0.0  # x + -0.0 is x for every x, also for -0.0

# Whose each of these batches is, by their numbers.
Owners = Callable[[Sequence[int]], Sequence[int]]


def by_place(team: Team) -> Owners:
    """Owners of batches that any process can take: dealt anew for each list of them."""
    return lambda batches: [place % team.size for place in range(len(batches))]


def by_number(team: Team) -> Owners:
    """Owners of batches that only one process has: number i is of process i mod size."""
    return lambda batches: [i % team.size for i in batches]


def turns(owners: Sequence[int]) -> Iterator[slice]:
    """The longest runs of a list of batches in which no process has two."""
    start = 0
    for place, owner in enumerate(owners):
        if owner in owners[start:place]:
            yield slice(start, place)
            start = place
    yield slice(start, len(owners))


class Gradients:
    """The gradients of parameters, which all processes of a team add up in one order.

    All parameters are of one type. What no batch gives a gradient has none.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], team: Team) -> None:
        self._team, self._buckets = team, list(_buckets(parameters))
        self._sums: list[Tensor | None] = [None] * len(self._buckets)
        self._reached = torch.zeros(len(parameters), dtype=torch.uint8)
        self._parameters = parameters

    def add(self, owners: Sequence[int]) -> None:
        """Add what is in .grad of each of these processes, in this order, and forget it there."""
        found = [p.grad is not None for p in self._parameters]
        self._reached |= torch.tensor(found, dtype=torch.uint8)
        for i, bucket in enumerate(self._buckets):
            pieces = self._team.exchange(_cut([_gradient(p) for p in bucket], self._team.size))
            for owner in owners:
                piece, total = pieces[owner], self._sums[i]
                self._sums[i] = piece.clone() if total is None else total.add_(piece)
        for parameter in self._parameters:
            parameter.grad = None

    def put(self) -> None:
        """Leave the sums in .grad of every process."""
        reached = self._team.largest(self._reached).tolist()
        for bucket, total in zip(self._buckets, self._sums, strict=True):
            assert total is not None
            whole = self._team.exchange(total.expand(self._team.size, -1)).flatten()
            sizes = [p.numel() for p in bucket]
            parts = whole[: sum(sizes)].split(sizes)
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        for parameter, found in zip(self._parameters, reached, strict=True):
            if not found:
                parameter.grad = None


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _gradient(parameter: nn.Parameter) -> Float[Tensor, " numel"]:
    if parameter.grad is None:
        return torch.full_like(parameter, NOTHING).detach().flatten()
    return parameter.grad.flatten()


def _cut(gradients: list[Tensor], size: int) -> Float[Tensor, "size piece"]:
    """Gradients one behind the other, in pieces of one size."""
    flat = torch.cat(gradients)
    return pad(flat, (0, -len(flat) % size), value=NOTHING).view(size, -1)
