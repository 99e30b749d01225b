"""Batches of windows that take turns: batch i is of process i mod size of a team.

What each process makes of its own is brought together everywhere, in the order of batches, so that
what is computed of it comes out as it does in one process.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from quip.model.team import Team

Item = TypeVar("Item")


def own_batches(
    tokens: Int[Tensor, "count seqlen"], batch_size: int, team: Team
) -> tuple[Int[Tensor, "_b seqlen"], ...]:
    """The batches of this process; none, where there are more processes than batches."""
    return tokens.split(batch_size)[team.rank :: team.size]


def in_turn(own: Sequence[Item], team: Team) -> list[Item]:
    """What all processes have, one thing of each batch, fit for JSON."""
    heard = team.hear(own)
    return [heard[i % team.size][i // team.size] for i in range(sum(map(len, heard)))]


def rows_in_turn(
    own: Shaped[Tensor, "_own ..."], batch_size: int, team: Team
) -> Shaped[Tensor, "_count ..."]:
    """What all processes have, one row of each window, in host memory."""
    if team.size == 1:
        return own
    spread = (team.spread(None, {"rows": own}, rank)[1]["rows"] for rank in range(team.size))
    found = [[part for part in rows.split(batch_size) if len(part)] for rows in spread]
    count = sum(map(len, found))
    return torch.cat([found[i % team.size][i // team.size] for i in range(count)])
