"""Rotation by a Hadamard matrix in C++: the ctypes side of cpu.cpp, one call for all passes."""

import ctypes
import math
from ctypes import POINTER, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from quip.kernels.hadamard.matrices import check, factors, matrix
from quip.kernels.native import library
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cpu.cpp")
DTYPES = (torch.float32, torch.float64)


def turn(
    x: Float[Tensor, "*batch n"],
    signs: Float[Tensor, " axis"] | None,
    block: int | None,
    *,
    rows: bool,
    transpose: bool,
) -> Float[Tensor, "*batch n"]:
    """D Omega x or Omega^T D x as in reference.py, without a gradient."""
    x = x.detach().contiguous()
    plan = _plan(x.shape[0 if rows else -1], block, transpose)
    y = x.new_empty(x.shape)
    signs = None if signs is None else signs.contiguous()
    at = None if signs is None else signs.data_ptr()
    before, after = (at, None) if transpose else (None, at)
    inner = x.shape[1] if rows else 1
    outer = x.numel() // (plan.n * max(inner, 1))
    _functions()[x.dtype](plan, x.data_ptr(), y.data_ptr(), before, after, outer, inner)
    return y


def _serves(x: Tensor, *_: object, **__: object) -> bool:
    return x.dtype in DTYPES and x.device.type == "cpu"


FORM = Form(turn, _serves, lambda: library(SOURCE) is not None)


class _Plan(ctypes.Structure):
    """The struct Plan of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("n", "runs", "blocks", "factors")],
        ("orders", c_int64 * 3),
        ("codes", c_void_p * 3),
        ("scale", c_double),
    )
    kept: list[Tensor]  # what the codes point to


@cache
def _plan(n: int, block: int | None, transpose: bool) -> _Plan:
    check(n, block)
    width = n if block is None else block
    *outer, runs = factors(width)
    plan = _Plan(n=width, runs=runs, blocks=n // width, factors=len(outer))
    plan.scale = 1 / math.sqrt(width)
    plan.kept = [_codes(order, transpose) for order in outer]
    plan.orders[: len(outer)] = outer
    plan.codes[: len(outer)] = [codes.data_ptr() for codes in plan.kept]
    return plan


@cache
def _codes(order: int, transpose: bool) -> UInt8[Tensor, "fours order"]:
    """Bit k of a code is set where column 4 i + k of K is -1."""
    K = matrix(order).cpu().T if transpose else matrix(order).cpu()
    a, b, c, d = (K < 0).to(torch.uint8).T.reshape(order // 4, 4, order).unbind(1)
    return (a | b << 1 | c << 2 | d << 3).contiguous()


@cache
def _functions() -> dict[torch.dtype, Any]:
    """The functions of cpu.cpp by the dtype of x."""
    native = library(SOURCE)
    assert native is not None
    functions = dict(zip(DTYPES, (native.rotate_float, native.rotate_double), strict=True))
    for function in functions.values():
        function.restype = None
        function.argtypes = (POINTER(_Plan), *4 * (c_void_p,), *2 * (c_int64,))
    return functions
