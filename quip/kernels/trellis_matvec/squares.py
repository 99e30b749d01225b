"""Multiply vectors by a packed matrix of trellis codes on 16 x 16 tiles whose steps have an order.

The ctypes side of squares.cpp. For a few vectors W~ is never in memory; for more it is decoded.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from quip.kernels import threads
from quip.kernels.native import library
from quip.kernels.operation import Form, learns
from quip.kernels.trellis import Code, Tiling
from quip.kernels.trellis.tables import places
from quip.kernels.trellis_matvec import reference

SOURCE = Path(__file__).with_name("squares.cpp")
SIDE = 16
FEW = 16  # vectors: for more, the matrix product of a decoded matrix is faster


class _TrellisSquares(ctypes.Structure):
    """The struct TrellisSquares of squares.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "n", "tokens", "row_bytes")],
        *[(name, c_void_p) for name in ("words", "order", "table", "scale", "x", "out")],
        *[(name, c_int32) for name in ("bits", "state_bits", "out_bytes")],
        *threads.FIELDS,
    )


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    code: Code,
    scales: Float[Tensor, " groups"],
    tiling: Tiling,
    *,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T in float32, without a gradient; `dtype` plays no part."""
    x = x.detach().contiguous()
    y = torch.empty(*x.shape[:-1], len(words))
    _call("multiply_squares", x, words, code, scales, tiling, y)
    return y


def decode(
    words: Int32[Tensor, "m words"],
    code: Code,
    scales: Float[Tensor, " groups"],
    tiling: Tiling,
    *,
    n: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m {n}"]:
    """W~ of packed codes, computed in float32 and rounded to `dtype`."""
    W = torch.empty(len(words), n, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
    _call("decode_squares", W, words, code, scales, tiling, W)
    return W.to(dtype)


multiply_decoded = partial(reference.multiply, decode=decode)


def _call(
    name: str, x: Tensor, words: Tensor, code: Code, scales: Tensor, tiling: Tiling, to: Tensor
) -> None:
    """A function of squares.cpp, which writes to the last tensor; decoding reads no x."""
    assert tiling.order is not None
    n, words, scales = x.shape[-1], words.contiguous(), scales.detach()
    call = _TrellisSquares(
        len(words),
        n,
        x.numel() // n,
        4 * words.shape[1],
        words.data_ptr(),
        places(tiling.order, torch.uint8, words.device).data_ptr(),
        code.table.data_ptr(),
        scales.data_ptr(),
        x.data_ptr(),
        to.data_ptr(),
        code.bits,
        code.L,
        to.itemsize,
        *threads.threads(),
    )
    native = library(SOURCE)
    assert native is not None
    getattr(native, name)(ctypes.byref(call))


def _serves(
    x: Tensor, words: Tensor, code: Code, scales: Tensor, tiling: Tiling, **_: object
) -> bool:
    few = 0 < x.numel() <= FEW * x.shape[-1]
    alone = few and x.dtype == torch.float32 and not learns(x)
    return alone and x.is_cpu and _reads(words, code, scales, tiling, x.shape[-1])


def _serves_many(
    x: Tensor, words: Tensor, code: Code, scales: Tensor, tiling: Tiling, **_: object
) -> bool:
    return x.is_cpu and x.numel() > 0 and _reads(words, code, scales, tiling, x.shape[-1])


def _serves_decoding(
    words: Tensor, code: Code, scales: Tensor, tiling: Tiling, *, n: int, **_: object
) -> bool:
    return _reads(words, code, scales, tiling, n)


def _reads(words: Tensor, code: Code, scales: Tensor, tiling: Tiling, n: int) -> bool:
    """Whether squares.cpp reads such a matrix: of whole tiles, with one scale."""
    if tiling.order is None or learns(scales, code.table):
        return False
    sizes = (len(words), tiling.columns) == (SIDE * tiling.count, SIDE) and n % SIDE == 0
    one = scales.shape == (1,) and scales.dtype == torch.float32
    return sizes and one and code.V == 1 and code.bits <= 8 and words.is_cpu


FORM = Form(multiply, _serves, lambda: library(SOURCE) is not None)
DECODED = Form(multiply_decoded, _serves_many, lambda: library(SOURCE) is not None)
DECODE = Form(decode, _serves_decoding, lambda: library(SOURCE) is not None)
