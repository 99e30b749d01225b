"""Multiply vectors by a matrix of packed codes of integer grids: y = x W~^T.

W~ is step (code - zero). Steps and zeros are shared by runs of `group` columns, by all of a row if
that is None; a single row of zeros serves all rows. A zero of None is (2^bits - 1) / 2, the middle
of the codes, and then a single row of steps serves all rows.
"""

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor
from torch.nn.functional import linear

from quip.kernels.bits import unpack
from quip.kernels.groups import spread


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    step: Float[Tensor, "m_or_1 groups"],
    zero: Integer[Tensor, "r groups"] | None,
    *,
    bits: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T, in the dtype of x; both are rounded to `dtype`, in which the product is computed."""
    codes = unpack(words, bits, x.shape[-1])
    return linear(x.to(dtype), decode(codes, step, zero, bits, group).to(dtype)).to(x.dtype)


def decode(
    codes: Integer[Tensor, "m n"],
    step: Float[Tensor, "m_or_1 groups"],
    zero: Integer[Tensor, "r groups"] | None,
    bits: int,
    group: int | None,
) -> Float[Tensor, "m n"]:
    """W~ in float32."""
    n = codes.shape[1]
    middle = (2**bits - 1) / 2 if zero is None else spread(zero, group, n)
    return codes.float().sub_(middle).mul_(spread(step.float(), group, n))


def decode_words(
    words: Int32[Tensor, "m words"],
    step: Float[Tensor, "m_or_1 groups"],
    zero: Integer[Tensor, "r groups"] | None,
    *,
    n: int,
    bits: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m n"]:
    """W~ of packed codes, rounded to `dtype`."""
    return decode(unpack(words, bits, n), step, zero, bits, group).to(dtype)
