"""Rotation by a Hadamard matrix in torch: a product with a small matrix for each pass."""

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from quip.kernels.hadamard.matrices import check, factors, matrix

RADIX_BITS = 6  # S is applied in factors of up to 2^6


def turn(
    x: Float[Tensor, "*batch n"],
    signs: Float[Tensor, " axis"] | None,
    block: int | None,
    *,
    rows: bool,
    transpose: bool,
) -> Float[Tensor, "*batch n"]:
    """D Omega x, or with `transpose` Omega^T D x, on the last axis; with `rows`, on the first one.

    The signs, D, are in the dtype of x; without them D is I. Raises UsageError as `check` does.
    """
    if rows:
        return turn(x.T, signs, block, rows=False, transpose=transpose).T
    if signs is None:
        return _rotated(x, block, transpose)
    return _rotated(x * signs, block, True) if transpose else _rotated(x, block, False) * signs


def _rotated(x: Tensor, block: int | None, transpose: bool) -> Tensor:
    check(x.shape[-1], block)
    width = x.shape[-1] if block is None else block
    orders, scale = _passes(width)
    y = x.reshape(-1, width)
    rows = y.shape[0]
    for order in reversed(orders):
        # A pass turns the last axis into the first one: after all passes each is back in place.
        K = _scaled(order, x.dtype, x.device)
        K = (K.T if transpose else K).expand(rows, order, order)
        y = torch.bmm(K, y.view(rows, width // order, order).mT).view(rows, width)
    return (y if scale == 1 else y.mul_(scale)).view(x.shape)


@cache
def _passes(width: int) -> tuple[tuple[int, ...], float]:
    """Orders of small matrices with the product `width`, and what is left of 1 / sqrt(width)."""
    *outer, last = factors(width)
    bits = last.bit_length() - 1
    count = max(1, math.ceil(bits / RADIX_BITS))
    orders = (*outer, *(2 ** ((bits + i) // count) for i in range(count)))
    return orders, math.prod(map(_power, orders)) / math.sqrt(width)


@cache
def _scaled(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """matrix(order) / 2^e, exact in any dtype, and no pass makes float16 overflow."""
    with torch.inference_mode(False):  # or no gradient could pass later
        return matrix(order).to(device, dtype) / _power(order)


def _power(order: int) -> int:
    """2^e, the smallest that is not below sqrt(order)."""
    return 2 ** math.ceil(math.log2(order) / 2)
