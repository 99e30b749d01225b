"""Add x x^T of many tokens to a float64 matrix, on and below its diagonal, in torch."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

PANELS = 4  # row panels; each stops at the diagonal, which saves 3/8 of the products
STRIP = 2**16  # numbers that a CPU rounds at once: what they need on the way fits a cache
OF_A_DEVICE = 2**24  # and another device, which waits for every call
QUANTUM = 2.0**-40  # of anchors: what a term is rounded to a multiple of
FIRST_UNITS = 1.5 * 2**52  # a float64 near this many units has the unit for its last digit


def add_products(
    lower: Float64[Tensor, "n n"],
    x: Float[Tensor, "tokens n"],
    anchors: Float64[Tensor, " n"] | None = None,
) -> Float64[Tensor, " n"]:
    """lower += P in place, P = X^T X summed in float32 (float64 for float64 inputs); returns P_ii.

    Only what is on and below the diagonal means anything. At most some 8192 tokens at once are
    exact enough in float32. With anchors d, powers of two, each P_ij is rounded to a multiple of
    2^-40 d_i d_j before it is added.
    """
    n = len(lower)
    panel = max(64, -(-n // PANELS))
    x = x if x.dtype == torch.float64 else x.float()
    squares = lower.new_empty(n)
    for lo in range(0, n, panel):
        hi = min(lo + panel, n)
        P = x[:, lo:hi].T @ x[:, :hi]
        squares[lo:hi] = P[:, lo:].diagonal()
        if anchors is None:
            lower[lo:hi, :hi] += P
        else:
            add_rounded(lower[lo:hi, :hi], P, anchors[lo:hi], anchors[:hi])
    return squares


def add_rounded(
    sums: Float64[Tensor, "m k"],
    P: Float[Tensor, "m k"],
    rows: Float64[Tensor, " m"],
    columns: Float64[Tensor, " k"],
) -> None:
    """sums_ij += P_ij rounded to a multiple of 2^-40 rows_i columns_j, in place.

    (P + C) - C rounds to the last digit of C, which stands for so many of these multiples.
    """
    most = STRIP if sums.device.type == "cpu" else OF_A_DEVICE
    strip = max(1, most // len(columns))
    for lo in range(0, len(rows), strip):
        at = slice(lo, lo + strip)
        C = torch.outer(FIRST_UNITS * QUANTUM * rows[at], columns)
        sums[at] += (P[at] + C).sub_(C)
