"""Oracle of two-sided rounding in float64, one weight or block after the other: YAQA's update.

Written from the equation alone (arXiv 2505.22988): with H = (I + U) D (I + U)^T on both sides and
E = W - W_hat so far, the block of rows i and columns j is rounded at

    x = (W + U_O^T E U_I + U_O^T E + E U_I)[i, j].

Nothing of the package is imported.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor


def block_ldl(H: Float64[Tensor, "n n"], size: int) -> tuple[Tensor, Tensor]:
    """U, strictly upper in blocks of `size`, and the block diagonal D, as a full matrix."""
    C = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    corners = torch.zeros_like(C)
    for lo in range(0, len(H), size):
        at = slice(lo, lo + size)
        corners[at, at] = C[at, at]
    U = C @ torch.linalg.inv(corners) - torch.eye(len(H), dtype=H.dtype)
    return U, corners @ corners.T


def two_sided(
    W: Float64[Tensor, "m n"],
    H_O: Float64[Tensor, "m m"],
    H_I: Float64[Tensor, "n n"],
    Q: Callable[[Tensor], Tensor],
    rows: int = 1,
    columns: int = 1,
) -> Float64[Tensor, "m n"]:
    """W_hat, rounded block by block by Q, down each block of columns."""
    U_O, U_I = block_ldl(H_O, rows)[0], block_ldl(H_I, columns)[0]
    W_hat, E = torch.zeros_like(W), torch.zeros_like(W)
    for j in range(0, W.shape[1], columns):
        for i in range(0, len(W), rows):
            x = W + U_O.T @ E @ U_I + U_O.T @ E + E @ U_I
            at = slice(i, i + rows), slice(j, j + columns)
            W_hat[at] = Q(x[at])
            E[at] = W[at] - W_hat[at]
    return W_hat


def loss(
    E: Float64[Tensor, "m n"], H_O: Float64[Tensor, "m m"], H_I: Float64[Tensor, "n n"]
) -> float:
    """tr(H_O E H_I E^T)."""
    return float(torch.trace(H_O @ E @ H_I @ E.T))
