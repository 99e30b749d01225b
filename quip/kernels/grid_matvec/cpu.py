"""Multiply a few vectors by a packed matrix of integer grids: the ctypes side of cpu.cpp.

It never has W~ in memory, and rounds nothing to the dtype that the reference computes in.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor

from quip.kernels.native import library
from quip.kernels.operation import Form
from quip.kernels.threads import Threads, threads

SOURCE = Path(__file__).with_name("cpu.cpp")
STEPS = (torch.float32, torch.bfloat16)
FEW = 8  # vectors: for more, the matrix product of a decoded matrix is faster


class _Matvec(ctypes.Structure):
    """The struct Matvec of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "n", "tokens", "row_bytes", "group")],
        *[(name, c_void_p) for name in ("words", "x", "step", "zero", "y")],
        *[(name, c_int32) for name in ("bits", "step_bytes")],
        ("threads", Threads),
    )


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    step: Float[Tensor, "m_or_1 groups"],
    zero: Integer[Tensor, "m groups"] | None,
    *,
    bits: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T in float32, without a gradient; `dtype` plays no part."""
    (m, width), n = words.shape, x.shape[-1]
    x, words, step = x.detach().contiguous(), words.contiguous(), step.contiguous()
    zero = None if zero is None else zero.contiguous()
    y = x.new_empty(*x.shape[:-1], m)
    call = _Matvec(
        *(m, n, x.numel() // n, 4 * width, group or n),
        *(words.data_ptr(), x.data_ptr(), step.data_ptr()),
        *(None if zero is None else zero.data_ptr(), y.data_ptr()),
        *(bits, step.itemsize, threads()),
    )
    native = library(SOURCE)
    assert native is not None
    native.multiply(ctypes.byref(call))
    return y


def _serves(x: Tensor, words: Tensor, step: Tensor, zero: Tensor | None, **_: object) -> bool:
    if (x.dtype, x.device.type) != (torch.float32, "cpu") or step.dtype not in STEPS:
        return False
    learns = torch.is_grad_enabled() and x.requires_grad
    rows = len(step) == 1 if zero is None else len(step) == len(words) and zero.dtype == torch.uint8
    return 0 < x.numel() <= FEW * x.shape[-1] and rows and not learns


FORM = Form(multiply, _serves, lambda: library(SOURCE) is not None)
