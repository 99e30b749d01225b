"""Add x x^T of many tokens to a float64 matrix, on and below its diagonal, in torch."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

PANELS = 4  # row panels; each stops at the diagonal, which saves 3/8 of the products


def add_products(
    lower: Float64[Tensor, "n n"], x: Float[Tensor, "tokens n"]
) -> Float64[Tensor, "n n"]:
    """lower += X^T X in place, summed in float32 (float64 for float64 inputs) before it is added.

    Only what is on and below the diagonal means anything. At most some 8192 tokens at once are
    exact enough in float32.
    """
    n = len(lower)
    panel = max(64, -(-n // PANELS))
    x = x if x.dtype == torch.float64 else x.float()
    for lo in range(0, n, panel):
        hi = min(lo + panel, n)
        lower[lo:hi, :hi] += x[:, lo:hi].T @ x[:, :hi]
    return lower
