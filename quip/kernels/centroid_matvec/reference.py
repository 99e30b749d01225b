"""Multiply vectors by a matrix of packed codes of learned codebooks: y = x W~^T.

A code names a centroid, d neighbours of a row. Each tile of W~ has k centroids of its own:

    w~ = s centroids[column group, row group, code]

A column group is `columns` columns, the last may be short. The m rows are cut into G row groups:
the first m % G have m // G + 1 rows, the others m // G. A scale s belongs to `block` columns of a
row, to all of them if that is None; scales of None are 1.
"""

import torch
from jaxtyping import Float, Int32, Int64, Integer
from torch import Tensor
from torch.nn.functional import linear

from quip.kernels.bits import unpack
from quip.kernels.groups import row_groups, spread
from quip.kernels.operation import Form

PART = 2**20  # weights that are decoded together


def decode(
    codes: Integer[Tensor, "m vectors"],
    centroids: Float[Tensor, "C G k d"],
    scales: Float[Tensor, "m blocks"] | None,
    *,
    columns: int,
    block: int | None,
) -> Float[Tensor, "m n"]:
    """W~ in the dtype of the centroids, n = d vectors; differentiable in centroids and scales."""
    groups = row_groups(len(codes), centroids.shape[1], codes.device)
    return _decode_rows(codes, groups, centroids, scales, columns, block)


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    centroids: Float[Tensor, "C G k d"],
    scales: Float[Tensor, "m blocks"] | None,
    *,
    columns: int,
    block: int | None,
    bits: int,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T for codes of 1 to 16 bits, in the dtype of x.

    Both factors are rounded to `dtype`, in which the product is computed.
    """
    codes = unpack(words, bits, x.shape[-1] // centroids.shape[-1])
    W = decode(codes, centroids, scales, columns=columns, block=block)
    return linear(x.to(dtype), W.to(dtype)).to(x.dtype)


def multiply_by_parts(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    centroids: Float[Tensor, "C G k d"],
    scales: Float[Tensor, "m blocks"] | None,
    *,
    columns: int,
    block: int | None,
    bits: int,
    dtype: torch.dtype,
    part: int = PART,
) -> Float[Tensor, "*batch m"]:
    """The products with some rows of W~ after the other.

    On a CPU memory for all of a large matrix comes from the system anew, which takes longer than
    to decode it.
    """
    n, d = x.shape[-1], centroids.shape[-1]
    groups = row_groups(len(words), centroids.shape[1], words.device)
    rounded, products = x.to(dtype), []
    for rows in torch.arange(len(words)).split(max(1, part // n)):
        some = slice(int(rows[0]), int(rows[-1]) + 1)
        theirs = None if scales is None else scales[some]
        codes = unpack(words[some], bits, n // d)
        W = _decode_rows(codes, groups[some], centroids, theirs, columns, block)
        products.append(linear(rounded, W.to(dtype)))
    return torch.cat(products, dim=-1).to(x.dtype)


def entries_of(
    codes: Integer[Tensor, "m vectors"], groups: Int64[Tensor, " m"], count: int, k: int, band: int
) -> Int64[Tensor, "m vectors"]:
    """The number of the centroid of each code among all: `count` row groups, `band` codes wide."""
    column_groups = torch.arange(codes.shape[1], device=codes.device) // band
    return (k * groups[:, None] + k * count * column_groups).add_(codes)


def _decode_rows(
    codes: Integer[Tensor, "m vectors"],
    groups: Int64[Tensor, " m"],
    centroids: Float[Tensor, "C G k d"],
    scales: Float[Tensor, "m blocks"] | None,
    columns: int,
    block: int | None,
) -> Float[Tensor, "m n"]:
    """W~ of rows of these row groups."""
    (m, vectors), (_, G, k, d) = codes.shape, centroids.shape
    index = entries_of(codes, groups, G, k, columns // d)
    # The gradient of gather is the fastest of those of torch's look-ups, by 10 times for d = 1.
    W = centroids.reshape(-1, d).gather(0, index.view(-1, 1).expand(-1, d)).view(m, -1)
    return W if scales is None else W * spread(scales.to(W), block, vectors * d)


PARTS = Form(multiply_by_parts, lambda x, *_, **__: x.device.type == "cpu")
