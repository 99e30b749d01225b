"""Round the columns of a panel to uniform grids, each with the errors of those before it.

    x_k = X_k + sum_{j<k} eta_j K[j, k]     q_k = clamp(floor(x_k / step_k + zero_k + 1/2), 0, top)
    eta_k = x_k - step_k (q_k - zero_k), or base_k - step_k (q_k - zero_k) given a base

A column of W is a contiguous row of X, eta, base and codes, drawn in quip/matrix/panel.py, which
does the same for any codebook.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def round_columns(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    step: Float[Tensor, "#n #m"],
    zero: Float[Tensor, "#n #m"],
    *,
    top: int,
    base: Float[Tensor, "n m"] | None = None,
) -> UInt8[Tensor, "n m"]:
    """The codes 0 ... top of the columns X; their errors are written into eta.

    A step and a zero are shared by all columns or belong to one, and so for rows of W. Ties go up.
    """
    steps, zeros = step.expand(len(X), -1), zero.expand(len(X), -1)
    return _each(X, K, eta, lambda k, x: (steps[k], zeros[k]), top, base)


def fit_and_round_columns(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    rhos: Float[Tensor, " candidates"],
    *,
    top: int,
    step_dtype: torch.dtype,
    base: Float[Tensor, "n m"] | None = None,
) -> tuple[UInt8[Tensor, "n m"], Float[Tensor, " n"]]:
    """(codes, steps): each column gets a step of its own just before it is rounded, and zero top/2.

    A step is 2 rho RMS(x_k) / top, rounded to `step_dtype`, for that of the rhos whose levels are
    nearest to x_k in squares.
    """
    steps = X.new_empty(len(X))
    zero = X.new_tensor(top / 2)

    def fitted(k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        steps[k] = _fitted(x, rhos, zero, top, step_dtype)
        return steps[k], zero

    return _each(X, K, eta, fitted, top, base), steps


def _each(
    X: Tensor,
    K: Tensor,
    eta: Tensor,
    grid: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    top: int,
    base: Tensor | None,
) -> Tensor:
    """The columns in order; `grid` gives the step and the zero of each."""
    codes = torch.empty(X.shape, dtype=torch.uint8, device=X.device)
    for k in range(len(X)):
        now = slice(k, k + 1)
        x = (torch.addmm(X[now], K[:k, now].T, eta[:k]) if k else X[now])[0]
        step, zero = grid(k, x)
        q = (x / step + zero + 0.5).floor().clamp(0, top)
        codes[k] = q
        eta[k] = (x if base is None else base[k]) - step * (q - zero)
    return codes


def _fitted(
    x: Tensor, rhos: Tensor, zero: Tensor, top: int, step_dtype: torch.dtype
) -> Float[Tensor, ""]:
    steps = rhos * (2 / top * x.square().mean().sqrt())
    tiny = torch.finfo(step_dtype).tiny  # a column of zeros: any positive step will do
    steps = steps.clamp_min(tiny).to(step_dtype).to(x.dtype)
    if len(steps) == 1:
        return steps[0]
    q = (x[:, None] / steps + zero + 0.5).floor().clamp(0, top)
    errors = (x[:, None] - steps * (q - zero)).square().sum(0)
    return steps[errors.argmin()]
