"""Add x x^T of many tokens to a float64 matrix on the tensor cores of a CUDA device.

Products of two numbers of bfloat16 or float16 are exact in float32, in which the tensor cores add
them up: only the order of the sums differs from the reference.

           columns 0 ... hi
    lower [ x . . . ]        a panel of BLOCK rows ends at its own diagonal block, so that of
          [ x x . . ]        n / BLOCK of them little more than half of n^2 is computed: on an
          [ x x x . ]        H100 1,014 TFLOP/s of 2 tokens n^2 at n = 11008, where the whole
          [ x x x x ]        product reaches 770
"""

from functools import cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from quip.kernels.hessian.reference import add_rounded
from quip.kernels.operation import Form

BLOCK = 1024  # rows of a panel
HALVES = (torch.bfloat16, torch.float16)


def add_products(
    lower: Float64[Tensor, "n n"],
    x: Float[Tensor, "tokens n"],
    anchors: Float64[Tensor, " n"] | None = None,
) -> Float64[Tensor, " n"]:
    """`add_products` of reference.py, for inputs of 16 bits."""
    squares = lower.new_empty(len(lower))
    for lo in range(0, len(lower), BLOCK):
        at, until = slice(lo, lo + BLOCK), slice(0, lo + BLOCK)
        P = multiply(x[:, at].T, x[:, until])
        squares[at] = P[:, lo:].diagonal()
        if anchors is None:
            lower[at, until] += P
        else:
            add_rounded(lower[at, until], P, anchors[at], anchors[until])
    return squares


def multiply(A: Float[Tensor, "m k"], B: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """A B of matrices of 16 bits, in float32."""
    return torch.mm(A, B, out_dtype=torch.float32)


def _serves(lower: Tensor, x: Tensor, anchors: Tensor | None = None) -> bool:
    return x.device.type == "cuda" and x.dtype in HALVES and x.numel() > 0


@cache
def _available() -> bool:
    """Whether this torch and this device multiply so, which they say by doing it once."""
    if not torch.cuda.is_available():
        return False
    try:
        for dtype in HALVES:
            one = torch.ones(16, 16, dtype=dtype, device="cuda")
            multiply(one.T, one)
    except (RuntimeError, TypeError):  # an older torch, or a device without bfloat16
        return False
    return True


FORM = Form(add_products, _serves, _available)
