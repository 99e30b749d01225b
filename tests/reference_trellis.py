"""Trellis codes once more, slowly and in float64, from the paper alone (QTIP, arXiv 2406.11235).

Dynamic programming runs over all states, not over overlaps, and a walk that ends where it begins
is found exactly: one search for each of the overlaps that it may begin with.
"""

import torch
from torch import Tensor


def states(codes: list[int], bits: int, L: int) -> list[int]:
    """The state of each step of a circular string: its last L bits."""
    window = -(-L // bits)
    found = []
    for t in range(len(codes)):
        s = 0
        for i in reversed(range(window)):
            s = (s << bits) | codes[(t - i) % len(codes)]
        found.append(s % 2**L)
    return found


def free_cost(x: Tensor, table: Tensor, bits: int) -> float:
    """The least squared error of any walk of these steps, wherever it begins and ends.

    x is [steps, V], the table [2^L, V].
    """
    return float(_costs(x, table, bits, None).min())


def closed_cost(x: Tensor, table: Tensor, bits: int) -> float:
    """The least squared error of any walk that ends where it begins."""
    overlaps = len(table) >> bits
    last = torch.arange(len(table)) % overlaps
    return min(
        float(_costs(x, table, bits, start)[last == start].min()) for start in range(overlaps)
    )


def _costs(x: Tensor, table: Tensor, bits: int, start: int | None) -> Tensor:
    """The least error of walks to each state; `start` is the overlap before their first step."""
    x, table = x.double(), table.double()
    count = len(table)
    before = torch.arange(count) >> bits  # the overlap of a state with the one before it
    overlap = torch.arange(count) % (count >> bits)
    costs = torch.zeros(count >> bits, dtype=torch.float64)
    if start is not None:
        costs += torch.inf
        costs[start] = 0
    total = costs[before]
    for target in x:
        total = costs[before] + (table - target).square().sum(1)
        costs = torch.full_like(costs, torch.inf).scatter_reduce(0, overlap, total, "amin")
    return total
