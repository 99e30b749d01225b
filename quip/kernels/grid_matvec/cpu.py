"""Multiply a few vectors by a packed matrix of integer grids: the ctypes side of cpu.cpp.

It never has W~ in memory, and rounds nothing to the dtype that the reference computes in.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor

from quip.kernels.groups import spread
from quip.kernels.native import library
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cpu.cpp")
FEW = 8  # vectors: for more, the matrix product of a decoded matrix is faster


class _Matvec(ctypes.Structure):
    """The struct Matvec of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "n", "tokens", "row_bytes", "group")],
        *[(name, c_void_p) for name in ("words", "x", "sums", "step", "zero")],
        *[(name, c_int64) for name in ("step_row", "zero_row")],
        ("y", c_void_p),
        ("bits", c_int32),
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
    (m, _), n = words.shape, x.shape[-1]
    X, words, step = x.detach().reshape(-1, n).contiguous(), words.contiguous(), step.float()
    if zero is None:  # one row of steps: as well applied to x, whatever the groups
        X, group = X * spread(step, group, n), None
        step, zeros = step.new_ones(1, 1), step.new_full((1, 1), (2**bits - 1) / 2)
    else:
        zeros = zero.float()
    sums = torch.stack([part.sum(1) for part in X.split(group or n, dim=1)], dim=1)
    y = X.new_empty(len(X), m)
    call = _Matvec(
        m=m,
        n=n,
        tokens=len(X),
        row_bytes=4 * words.shape[1],
        group=group or n,
        words=words.data_ptr(),
        x=X.data_ptr(),
        sums=sums.data_ptr(),
        step=step.data_ptr(),
        zero=zeros.data_ptr(),
        step_row=step.shape[1] if len(step) > 1 else 0,
        zero_row=zeros.shape[1] if len(zeros) > 1 else 0,
        y=y.data_ptr(),
        bits=bits,
    )
    native = library(SOURCE)
    assert native is not None
    native.multiply(ctypes.byref(call))
    return y.view(*x.shape[:-1], m)


def _serves(x: Tensor, *_: object, **__: object) -> bool:
    if (x.dtype, x.device.type) != (torch.float32, "cpu"):
        return False
    learns = torch.is_grad_enabled() and x.requires_grad
    return 0 < x.numel() <= FEW * x.shape[-1] and not learns


FORM = Form(multiply, _serves, lambda: library(SOURCE) is not None)
