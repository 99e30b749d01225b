"""Rotate vectors by a Kronecker product in C++: the ctypes side of cpu.cpp."""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quip.kernels import threads
from quip.kernels.cuda import pointer
from quip.kernels.native import library
from quip.kernels.operation import Form, learns

SOURCE = Path(__file__).with_name("cpu.cpp")
NUMBERS = {torch.float32, torch.bfloat16}  # that cpu.cpp reads and writes


class _Rotation(ctypes.Structure):
    """The struct Rotation of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("p", "q", "count")],
        *[(name, c_void_p) for name in ("left", "right", "first", "last", "before", "after")],
        *[(name, c_void_p) for name in ("x", "y")],
        *[(name, c_int32) for name in ("x_bytes", "y_bytes")],
        *threads.FIELDS,
    )


def rotate(
    x: Float[Tensor, "*batch n"],
    left: Float[Tensor, "p p"],
    right: Float[Tensor, "q q"],
    first: Int[Tensor, " n"] | None,
    last: Int[Tensor, " n"] | None,
) -> Float[Tensor, "*batch n"]:
    """P' (left (x) right^T) P x as in reference.py, without a gradient."""
    return rotate_scaled(x, left, right, first, last, None, None, dtype=x.dtype)


def rotate_scaled(
    x: Float[Tensor, "*batch n"],
    left: Float[Tensor, "p p"],
    right: Float[Tensor, "q q"],
    first: Int[Tensor, " n"] | None,
    last: Int[Tensor, " n"] | None,
    before: Float[Tensor, " n"] | None,
    after: Float[Tensor, " n"] | None,
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch n"]:
    """diag(after) P' (left (x) right^T) P diag(before) x in dtype, without a gradient."""
    x, left, right = x.contiguous(), left.contiguous(), right.contiguous()
    first, last = _laid_out(first, torch.int32), _laid_out(last, torch.int32)
    before, after = _laid_out(before, torch.float32), _laid_out(after, torch.float32)
    y = torch.empty(x.shape, dtype=dtype)
    call = _Rotation(
        left.shape[0],  # len() of a tensor takes longer than this vector
        right.shape[0],
        x.numel() // x.shape[-1],
        left.data_ptr(),
        right.data_ptr(),
        pointer(first),
        pointer(last),
        pointer(before),
        pointer(after),
        x.data_ptr(),
        y.data_ptr(),
        x.itemsize,
        y.itemsize,
        *threads.threads(),
    )
    native = library(SOURCE)
    assert native is not None
    native.rotate_kronecker(ctypes.byref(call))
    return y


def _laid_out(part: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if part is None or (part.dtype == dtype and part.is_contiguous()):
        return part
    return part.to(dtype).contiguous()


def _serves(x: Tensor, left: Tensor, *others: Tensor | None) -> bool:
    return x.dtype == torch.float32 and _serves_scaled(x, left, *others, dtype=x.dtype)


def _serves_scaled(x: Tensor, left: Tensor, *others: Tensor | None, dtype: torch.dtype) -> bool:
    known = left.dtype == torch.float32 and x.dtype in NUMBERS and dtype in NUMBERS
    return x.is_cpu and known and x.numel() > 0 and not learns(x, *others)


FORM = Form(rotate, _serves, lambda: library(SOURCE) is not None)
SCALED = Form(rotate_scaled, _serves_scaled, lambda: library(SOURCE) is not None)
