"""Rotate vectors by a Kronecker product in C++: the ctypes side of cpu.cpp."""

import ctypes
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quip.kernels.native import library
from quip.kernels.operation import Form
from quip.kernels.threads import Threads, threads

SOURCE = Path(__file__).with_name("cpu.cpp")


class _Rotation(ctypes.Structure):
    """The struct Rotation of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("p", "q", "count")],
        *[(name, c_void_p) for name in ("left", "right", "first", "last", "x", "y")],
        ("threads", Threads),
    )


def rotate(
    x: Float[Tensor, "*batch n"],
    left: Float[Tensor, "p p"],
    right: Float[Tensor, "q q"],
    first: Int[Tensor, " n"] | None,
    last: Int[Tensor, " n"] | None,
) -> Float[Tensor, "*batch n"]:
    """P' (left (x) right^T) P x as in reference.py, without a gradient."""
    x, left, right = x.detach().contiguous(), left.contiguous(), right.contiguous()
    first, last = _indices(first), _indices(last)
    y = torch.empty_like(x)
    call = _Rotation(
        len(left),
        len(right),
        x.numel() // x.shape[-1],
        left.data_ptr(),
        right.data_ptr(),
        None if first is None else first.data_ptr(),
        None if last is None else last.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        threads(),
    )
    native = library(SOURCE)
    assert native is not None
    native.rotate_kronecker(ctypes.byref(call))
    return y


def _indices(order: Tensor | None) -> Tensor | None:
    return None if order is None else order.to(torch.int32).contiguous()


def _serves(x: Tensor, *_: object) -> bool:
    if (x.dtype, x.device.type) != (torch.float32, "cpu"):
        return False
    return x.numel() > 0 and not (torch.is_grad_enabled() and x.requires_grad)


FORM = Form(rotate, _serves, lambda: library(SOURCE) is not None)
