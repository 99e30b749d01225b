"""Multiply vectors by a matrix of packed lattice codes: y = x W~^T.

W~ is decoded as in kernels/lattice_points, with the tables of one or two stages and a scale for
each `group` codes of a row, or one for all if that is None.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import linear

from quip.kernels.bits import unpack
from quip.kernels.lattice_points import Stage, decode
from quip.kernels.lattice_points.tables import DIM, code_bits
from quip.kernels.operation import Form

PART = 2**20  # weights that are decoded together


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    stages: Sequence[Stage],
    scales: Float[Tensor, " groups"],
    *,
    group: int | None,
    ratio: float | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T, in the dtype of x; both are rounded to `dtype`, in which the product is computed."""
    codes = unpack(words, code_bits(stages), x.shape[-1] // DIM)
    W = decode(codes, stages, scales, group=group, ratio=ratio)
    return linear(x.to(dtype), W.to(dtype)).to(x.dtype)


def decode_words(
    words: Int32[Tensor, "m words"],
    stages: Sequence[Stage],
    scales: Float[Tensor, " groups"],
    *,
    n: int,
    group: int | None,
    ratio: float | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m n"]:
    """W~ of packed codes, rounded to `dtype`."""
    codes = unpack(words, code_bits(stages), n // DIM)
    return decode(codes, stages, scales, group=group, ratio=ratio).to(dtype)


def multiply_by_parts(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    stages: Sequence[Stage],
    scales: Float[Tensor, " groups"],
    *,
    group: int | None,
    ratio: float | None,
    dtype: torch.dtype,
    part: int = PART,
) -> Float[Tensor, "*batch m"]:
    """The products with some rows of W~ after the other.

    On a CPU memory for all of a large matrix comes from the system anew, which takes longer than
    to decode it.
    """
    rounded = x.to(dtype)
    products = [
        multiply(rounded, rows, stages, scales, group=group, ratio=ratio, dtype=dtype)
        for rows in words.split(max(1, part // x.shape[-1]))
    ]
    return torch.cat(products, dim=-1).to(x.dtype)


PARTS = Form(multiply_by_parts, lambda x, *_, **__: x.device.type == "cpu")
