"""Feedback: how the rounding error of each column is carried to the columns after it.

Every rule turns H into a pair (K, h). With eta_j = x_j - w_hat_j, the error made in rounding the
running column x_j, the sweep computes

    x_k = w_k + sum_{j<k} eta_j K[j, k].

The papers feed back E = W - W_hat through a strictly upper F. The two are one rule, because
E = eta (I + F)^-1: K = I - (I + F)^-1. The running form is kept since a scale that is
refitted during the sweep must see x, which E alone does not hold. h weighs the columns: the
loss of a sweep is the sum of h_k |eta_k|^2 where K comes from `ldl`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from quip.matrix.linalg import (
    block_jacobi,
    block_ldl,
    cholesky,
    mirror,
    strictly_block_upper,
    unit_upper_inverse,
)

Feedback = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def none(H: Float[Tensor, "n n"], dim: int = 1) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """K = 0: each column is rounded by itself (nearest or stochastic rounding)."""
    K = H.new_zeros((), dtype=torch.float64).expand(H.shape)
    return K, H.diagonal().to(torch.float64, copy=True)  # of H nothing is held


def ldl(
    H: Float[Tensor, "n n"], dim: int = 1, *, in_place: bool = False
) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """F = U of H = (I + U) D (I + U)^T: LDLQ, and OPTQ in natural order (QuIP, Theorem 6).

    Returns K and diag(D). With `in_place` K takes the memory of H, as `block_ldl` does. Raises
    NotPositiveDefinite.
    """
    U, D = block_ldl(H, dim, in_place=in_place)
    return running(U), D.diagonal(dim1=1, dim2=2).reshape(-1)


def coordinate(
    H: Float[Tensor, "n n"], dim: int = 1
) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """F = (H . M) diag(H)^-1: each column minimises the loss, later columns still unrounded.

    One sweep with it is the first pass of stand-alone greedy updates (QuIP, Algorithm 4 with
    the guess W itself).
    """
    F = strictly_block_upper(block_jacobi(H.double(), dim), dim)
    return running(F), H.diagonal().double()


def admm(
    H: Float[Tensor, "n n"],
    dim: int = 1,
    *,
    bound: float = 1.0,
    penalty: float = 0.1,
    iterations: int = 100,
    tolerance: float = 1e-4,
) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """F = L^-1 - I for the unit upper L that minimises tr(H L^T L), columns |L e_i|^2 <= 1 + bound.

    QuIP, Algorithm 5, step 3, by ADMM on L = I + Z; stops early once Z moves by less than
    `tolerance` of its norm in both residuals. In running form K = I - L = -Z: no inverse.
    """
    if dim != 1:
        raise ValueError(f"bounded feedback is defined for single columns, not blocks of {dim}")
    H = H.double() / H.diagonal().max()
    C = cholesky((2 * H + penalty * torch.eye(len(H), dtype=H.dtype, device=H.device)).flip(0, 1))
    C = C.flip(0, 1)  # upper: 2H + penalty I = C C^T
    Z, Y = torch.zeros_like(H), torch.zeros_like(H)
    for _ in range(iterations):
        G = (penalty * (Z - Y) - 2 * H).triu(1)
        X = torch.linalg.solve_triangular(C.T, G, upper=False, left=False).triu(1)
        X = torch.linalg.solve_triangular(C, X, upper=True, left=False)
        last = Z
        Z = X + Y
        norms = Z.norm(dim=0).clamp_min(torch.finfo(Z.dtype).tiny)
        Z = Z * (bound**0.5 / norms).clamp_max(1.0)
        Y = Y + X - Z
        if max((X - Z).norm(), (Z - last).norm()) <= tolerance * Z.norm():
            break
    return -Z, H.diagonal()


def running(F: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """K = I - (I + F)^-1 for strictly (block) upper F, contiguous as it or its transpose is.

    F is lost: K takes its memory.
    """
    K = unit_upper_inverse(F, in_place=True).neg_().add_(0.0)  # and no zero has a sign
    K.diagonal().add_(1)
    if K.is_contiguous():
        return K
    mirror(K.T)
    return K.T.triu_(1)
