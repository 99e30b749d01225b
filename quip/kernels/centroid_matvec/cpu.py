"""Multiply a few vectors by a matrix of packed codes of learned codebooks: the side of cpu.cpp.

It never has W~ in memory, and rounds nothing to the dtype that the reference computes in.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from quip.kernels import threads
from quip.kernels.native import library
from quip.kernels.operation import Form, learns

SOURCE = Path(__file__).with_name("cpu.cpp")
FEW = 16  # vectors: for more, products with decoded rows are as fast

DIMS = (1, 2, 4)


class _CentroidMatvec(ctypes.Structure):
    """The struct CentroidMatvec of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "n", "tokens", "row_bytes")],
        *[(name, c_int64) for name in ("columns", "row_groups", "block", "dim")],
        *[(name, c_void_p) for name in ("words", "x", "centroids", "scales", "y")],
        ("bits", c_int32),
        *threads.FIELDS,
    )


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
    """x W~^T in float32, without a gradient; k is 2^bits, and `dtype` plays no part."""
    (_, G, _, d), n = centroids.shape, x.shape[-1]
    X, words = x.detach().contiguous(), words.contiguous()
    centroids = centroids.detach().float().contiguous()
    scales = None if scales is None else scales.detach().float().contiguous()
    y = X.new_empty(*x.shape[:-1], len(words))
    parallel, count = threads.threads()
    call = _CentroidMatvec(
        m=len(words),
        n=n // d,
        tokens=X.numel() // n,
        row_bytes=4 * words.shape[1],
        columns=columns // d,
        row_groups=G,
        block=(block or n) // d,
        dim=d,
        words=words.data_ptr(),
        x=X.data_ptr(),
        centroids=centroids.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        y=y.data_ptr(),
        bits=bits,
        parallel=parallel,
        thread_count=count,
    )
    native = library(SOURCE)
    assert native is not None
    native.multiply_centroids(ctypes.byref(call))
    return y


def _serves(
    x: Tensor,
    words: Tensor,
    centroids: Tensor,
    scales: Tensor | None,
    *,
    columns: int,
    block: int | None,
    bits: int,
    dtype: torch.dtype,
) -> bool:
    if (x.dtype, x.device.type) != (torch.float32, "cpu"):
        return False
    k, d = centroids.shape[2:]
    whole = block is None or block % d == 0  # no scale begins inside a vector
    known = k == 2**bits and d in DIMS and whole
    return 0 < x.numel() <= FEW * x.shape[-1] and known and not learns(x, centroids, scales)


FORM = Form(multiply, _serves, lambda: library(SOURCE) is not None)
