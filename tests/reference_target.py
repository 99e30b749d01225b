"""Independent oracles of the asymmetric target: float64, slow and plain, nothing of the package.

x~ are the inputs of a matrix in the original model and x those in the model quantized so far, both
[tokens, n]; h~ and h, [tokens, m], are what its output is added to, where that is the residual
stream. lam is a number: what damping adds to the diagonal.
"""

import torch
from jaxtyping import Float64
from torch import Tensor


def target(
    W: Float64[Tensor, "m n"],
    originals: Float64[Tensor, "tokens n"],
    inputs: Float64[Tensor, "tokens n"],
    residuals: Float64[Tensor, "tokens m"],
    lam: float,
) -> Float64[Tensor, "m n"]:
    """W* = (W (G + lam I) + R) (H + lam I)^-1, G = E[x~ x^T], H = E[x x^T], R = E[(h~ - h) x^T]."""
    tokens, n = inputs.shape
    H, G = inputs.T @ inputs / tokens, originals.T @ inputs / tokens
    R = residuals.T @ inputs / tokens
    damping = lam * torch.eye(n, dtype=W.dtype)
    return (W @ (G + damping) + R) @ torch.linalg.inv(H + damping)


def asymmetric_loss(
    W_hat: Float64[Tensor, "m n"],
    W: Float64[Tensor, "m n"],
    originals: Float64[Tensor, "tokens n"],
    inputs: Float64[Tensor, "tokens n"],
    residuals: Float64[Tensor, "tokens m"],
) -> float:
    """E |W_hat x - W x~ - (h~ - h)|^2."""
    wrong = inputs @ W_hat.T - originals @ W.T - residuals
    return float(wrong.square().sum()) / len(inputs)


def best_share(
    shift: Float64[Tensor, "m n"],
    W: Float64[Tensor, "m n"],
    originals: Float64[Tensor, "tokens n"],
    inputs: Float64[Tensor, "tokens n"],
    residuals: Float64[Tensor, "tokens m"],
    steps: int = 10_000,
) -> float:
    """The alpha among 0, 1 / steps ... 1 with the least loss of W + alpha shift, by trying them."""
    found = [0.0, 0.5, 1.0]
    at = [asymmetric_loss(W + a * shift, W, originals, inputs, residuals) for a in found]
    # A parabola through three of its points, since each trial takes a pass over all tokens.
    bend = 2 * (at[0] - 2 * at[1] + at[2])
    slope = at[2] - at[0] - bend
    shares = torch.arange(steps + 1, dtype=torch.float64) / steps
    return float(shares[(bend * shares**2 + slope * shares).argmin()])
