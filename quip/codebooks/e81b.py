"""E81B: 256 short points of the lattice E8, eight weights in 8 bits; it serves as a second stage.

Rows 0 to 112 are the whole points of squared norm 0 and 2, rows 113 to 240 the half ones
(+-1/2 everywhere, even sum), both in ascending order; then +2 e_0 ... +2 e_7, -2 e_0 ... -2 e_6.
A byte has no room for -2 e_7.
"""

from functools import cache

import torch
from jaxtyping import Float, Int8, Int32, Integer, UInt8
from torch import Tensor

from quip.kernels.lattice_points import E81B, nearest_of, points_of

INDEX_BITS = 8
DIM = 8
WHOLE, HALF = 113, 128  # rows of either kind


@cache
def doubled() -> Int8[Tensor, "256 8"]:
    """Twice each point."""
    numbers = torch.arange(3**DIM)[:, None] // 3 ** torch.arange(7, -1, -1) % 3 - 1
    short = numbers.square().sum(1)
    whole = numbers[(short == 0) | (short == 2)]
    half = (torch.arange(2**DIM)[:, None] >> torch.arange(7, -1, -1) & 1) * 2 - 1
    half = half[half.sum(1) % 4 == 0]
    long = 4 * torch.eye(DIM, dtype=torch.int64)
    return torch.cat([2 * whole, half, long, -long[:7]]).to(torch.int8)


@cache
def pair_rows() -> UInt8[Tensor, "8 8 2 2"]:
    """The row of the whole point with entries at i and j, each negative (1) or positive (0)."""
    rows = torch.zeros(8, 8, 2, 2, dtype=torch.uint8)
    whole = doubled()[:WHOLE]
    for row, point in enumerate(whole.tolist()):
        if any(point):
            i, j = (k for k in range(DIM) if point[k])
            s, t = int(point[i] < 0), int(point[j] < 0)
            rows[i, j, s, t] = rows[j, i, t, s] = row
    return rows


@cache
def tables(device: torch.device) -> E81B:
    """What kernels/lattice_points is to know of the lattice."""
    return E81B(points=(doubled() / 2).to(device), pairs=pair_rows().to(device))


def decode(
    codes: Integer[Tensor, "*k"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*k 8"]:
    """The points, exactly."""
    return points_of(codes, tables(codes.device), dtype)


def nearest(x: Float[Tensor, "m 8"]) -> Int32[Tensor, " m"]:
    """The codes of the points nearest to x, in torch; half precision counts as float32."""
    return nearest_of(x, tables(x.device))
