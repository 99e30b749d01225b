"""Multiply vectors by a matrix of packed trellis codes: y = x W~^T.

W~ = scale C[state], decoded as in kernels/trellis, with a scale for each `group` columns of W~, or
one for all if that is None.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import linear

from quip.kernels.bits import unpack
from quip.kernels.groups import spread
from quip.kernels.trellis import Code, Tiling
from quip.kernels.trellis import decode as decode_codes


def decode_words(
    words: Int32[Tensor, "m words"],
    code: Code,
    scales: Float[Tensor, " groups"],
    tiling: Tiling,
    *,
    n: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m n"]:
    """W~ of packed codes, rounded to `dtype`."""
    codes = unpack(words, code.bits, n // code.V)
    W = decode_codes(codes, code, tiling)
    return W.mul_(spread(scales[None], group, n)).to(dtype)


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    code: Code,
    scales: Float[Tensor, " groups"],
    tiling: Tiling,
    *,
    group: int | None,
    dtype: torch.dtype,
    decode: Callable[..., Tensor] = decode_words,
) -> Float[Tensor, "*batch m"]:
    """x W~^T, in the dtype of x; both are rounded to `dtype`, in which the product is computed.

    `decode` is `decode_words` or a faster form of it.
    """
    W = decode(words, code, scales, tiling, n=x.shape[-1], group=group, dtype=dtype)
    return linear(x.to(dtype), W).to(x.dtype)
