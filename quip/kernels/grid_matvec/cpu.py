"""Multiply vectors by a packed matrix of integer grids: the ctypes side of cpu.cpp.

For a few vectors W~ is never in memory, and nothing is rounded to the dtype that the reference
computes in. For more it is decoded, straight to that dtype.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor
from torch.nn.functional import linear

from quip.kernels import threads
from quip.kernels.cuda import pointer
from quip.kernels.few_tokens import row_stride
from quip.kernels.native import library
from quip.kernels.operation import Form, learns

SOURCE = Path(__file__).with_name("cpu.cpp")
NUMBERS = {torch.float32, torch.bfloat16}  # that cpu.cpp reads as steps and writes as weights
STEPS = {*NUMBERS, torch.float16}  # which are widened first
FEW = 8  # vectors: for more, the matrix product of a decoded matrix is faster


class _Matvec(ctypes.Structure):
    """The struct Matvec of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "n", "tokens", "row_bytes", "group", "zero_row")],
        *[(name, c_void_p) for name in ("words", "x", "step", "zero", "y")],
        *[(name, c_int32) for name in ("bits", "step_bytes")],
        *threads.FIELDS,
    )


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
    """x W~^T in float32, without a gradient; `dtype` plays no part."""
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], words.shape[0])
    _call("multiply", x, words, step, zero, bits, group, y)
    return y


def multiply_decoded(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    step: Float[Tensor, "m_or_1 groups"],
    zero: Integer[Tensor, "r groups"] | None,
    *,
    bits: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T as in reference.py, bit for bit: only the decoding is another."""
    W = decode(words, step, zero, bits, group, x.shape[-1], dtype)
    return linear(x.to(dtype), W).to(x.dtype)


def decode(
    words: Int32[Tensor, "m words"],
    step: Float[Tensor, "m_or_1 groups"],
    zero: Integer[Tensor, "r groups"] | None,
    bits: int,
    group: int | None,
    n: int,
    dtype: torch.dtype,
) -> Float[Tensor, "m {n}"]:
    """W~ of packed codes, computed in float32 and rounded to `dtype`, which is one of NUMBERS."""
    W = torch.empty(len(words), n, dtype=dtype)
    _call("decode", W, words, step, zero, bits, group, W)
    return W


def _call(
    name: str,
    x: Tensor,
    words: Tensor,
    step: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int | None,
    to: Tensor,
) -> None:
    """A function of cpu.cpp, which writes to the last tensor; decoding reads no x."""
    (m, width), n = words.shape, x.shape[-1]
    step = step.contiguous() if step.dtype in NUMBERS else step.float().contiguous()
    words = words.contiguous()
    zero = None if zero is None else zero.contiguous()
    call = _Matvec(
        m,
        n,
        x.numel() // n,
        4 * width,
        min(group or n, n),  # a file may name any
        row_stride(zero),
        words.data_ptr(),
        x.data_ptr(),
        step.data_ptr(),
        pointer(zero),
        to.data_ptr(),
        bits,
        step.itemsize,
        *threads.threads(),
    )
    native = library(SOURCE)
    assert native is not None
    getattr(native, name)(ctypes.byref(call), to.itemsize)


def _serves(x: Tensor, words: Tensor, step: Tensor, zero: Tensor | None, **_: object) -> bool:
    few = 0 < x.numel() <= FEW * x.shape[-1]
    return few and x.dtype == torch.float32 and not learns(x) and _read(x, words, step, zero)


def _serves_many(
    x: Tensor, words: Tensor, step: Tensor, zero: Tensor | None, *, dtype: torch.dtype, **_: object
) -> bool:
    return dtype in NUMBERS and x.numel() > 0 and _read(x, words, step, zero)


def _read(x: Tensor, words: Tensor, step: Tensor, zero: Tensor | None) -> bool:
    """Whether cpu.cpp reads such a matrix."""
    if not (x.is_cpu and words.is_cpu and step.dtype in STEPS) or step.requires_grad:
        return False
    if zero is None:
        return step.shape[0] == 1
    return step.shape[0] == words.shape[0] and zero.dtype == torch.uint8


FORM = Form(multiply, _serves, lambda: library(SOURCE) is not None)
DECODED = Form(multiply_decoded, _serves_many, lambda: library(SOURCE) is not None)
