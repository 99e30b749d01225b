"""In which order the columns of a matrix are rounded."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Order = Callable[[Tensor, int, int | None], Tensor]


def natural(H: Float[Tensor, "n n"], dim: int, group: int | None) -> Int[Tensor, " n"]:
    """First column to last: OPTQ."""
    return torch.arange(len(H), device=H.device)


def backwards(H: Float[Tensor, "n n"], dim: int, group: int | None) -> Int[Tensor, " n"]:
    """Last column to first, in blocks of `dim`: QuIP's LDLQ as published.

    Groups are counted from the first column; a short last group stays last.
    """
    columns = natural(H, dim, group).reshape(-1, dim)
    whole = len(columns) - len(columns) % ((group or dim) // dim)
    return torch.cat([columns[:whole].flip(0), columns[whole:].flip(0)]).reshape(-1)


def largest_first(H: Float[Tensor, "n n"], dim: int, group: int | None) -> Int[Tensor, " n"]:
    """By diag(H), largest first; whole groups by their mean, and blocks of `dim` inside them.

    A short last group stays last.
    """
    weight = H.diagonal().reshape(-1, dim).mean(1)  # [n/dim]
    size = (group or len(H)) // dim
    order = [
        torch.argsort(part, descending=True, stable=True) + start * size
        for start, part in enumerate(weight.split(size))
    ]
    means = torch.stack([part.mean() for part in weight.split(size)])
    whole = means if len(weight) % size == 0 else means[:-1]
    ranks = torch.argsort(whole, descending=True, stable=True).tolist()
    blocks = torch.cat([order[g] for g in [*ranks, *range(len(ranks), len(order))]])
    return (blocks[:, None] * dim + torch.arange(dim, device=H.device)).reshape(-1)
