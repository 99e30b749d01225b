"""Multiply a few vectors by a matrix of packed lattice codes: the ctypes side of cpu.cpp.

It never has W~ in memory, and rounds nothing to the dtype that the reference computes in.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from quip.kernels import threads
from quip.kernels.lattice_points.tables import DIM, E8P, E81B, Stage
from quip.kernels.native import library
from quip.kernels.operation import Form, learns

SOURCE = Path(__file__).with_name("cpu.cpp")
FEW = 16  # vectors: for more, products with decoded rows are as fast
NUMBERS = {E8P: 1, E81B: 2}  # the enum Stage


class _LatticeMatvec(ctypes.Structure):
    """The struct LatticeMatvec of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "blocks", "tokens", "row_bytes", "group")],
        *[(name, c_void_p) for name in ("words", "x", "scales", "magnitudes", "points", "y")],
        ("ratio", c_float),
        ("second", c_int32),
        *threads.FIELDS,
    )


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
    """x W~^T in float32, without a gradient; the first stage is E8P, and `dtype` plays no part."""
    n, X, words = x.shape[-1], x.detach().contiguous(), words.contiguous()
    y = X.new_empty(*x.shape[:-1], len(words))
    scales, (first, *others) = scales.float().contiguous(), stages
    second = others[0] if others else None
    assert isinstance(first, E8P)
    parallel, count = threads.threads()
    call = _LatticeMatvec(
        m=len(words),
        blocks=n // DIM,
        tokens=X.numel() // n,
        row_bytes=4 * words.shape[1],
        group=group or n // DIM,
        words=words.data_ptr(),
        x=X.data_ptr(),
        scales=scales.data_ptr(),
        magnitudes=first.magnitudes.data_ptr(),
        points=second.points.data_ptr() if isinstance(second, E81B) else None,
        y=y.data_ptr(),
        ratio=ratio or 1.0,
        second=NUMBERS[type(second)] if second else 0,
        parallel=parallel,
        thread_count=count,
    )
    native = library(SOURCE)
    assert native is not None
    native.multiply_lattice(ctypes.byref(call))
    return y


def _serves(x: Tensor, *_: object, **__: object) -> bool:
    if (x.dtype, x.device.type) != (torch.float32, "cpu"):
        return False
    return 0 < x.numel() <= FEW * x.shape[-1] and not learns(x)


FORM = Form(multiply, _serves, lambda: library(SOURCE) is not None)
