"""Rotation by a Hadamard matrix: Omega = (K x S) / sqrt(n), K of the smallest order that fits.

Each factor of the Kronecker product is one cheap pass, and random signs D make the rotation
D Omega. cpu.cpp does it all in one call for float32 and float64 on a CPU. Elsewhere a pass
is a product with a small matrix; both agree up to rounding noise.
"""

import ctypes
import math
from collections.abc import Callable
from ctypes import POINTER, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from quip.kernels.hadamard.matrices import check, factors, matrix
from quip.kernels.native import library

SOURCE = Path(__file__).with_name("cpu.cpp")
RADIX_BITS = 6  # in torch, S is applied in factors of up to 2^6
HALVES = (torch.float16, torch.bfloat16)
Rotation = Callable[[Tensor, "_How"], Tensor]


def rotate(
    x: Float[Tensor, "*batch n"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """D Omega x on the last axis, Omega = (K x S) / sqrt(n), the index of K the outer one.

    D is the diagonal matrix of the signs, which may be any numbers; without them it is I. With a
    block, Omega is block diagonal: n / block times the Omega of that width. Raises UsageError as
    `check` does.
    """
    return _turn(x, signs, _How(block, rows=False, transpose=False))


def invert(
    x: Float[Tensor, "*batch n"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """Omega^T D x on the last axis: `rotate` undone where all signs are +-1."""
    return _turn(x, signs, _How(block, rows=False, transpose=True))


def rotate_rows(
    W: Float[Tensor, "n m"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "n m"]:
    """D Omega W."""
    return _turn(W, signs, _How(block, rows=True, transpose=False))


def invert_rows(
    W: Float[Tensor, "n m"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "n m"]:
    """Omega^T D W."""
    return _turn(W, signs, _How(block, rows=True, transpose=True))


class _How(NamedTuple):
    block: int | None
    rows: bool  # on the first axis of a matrix, otherwise on the last one of anything
    transpose: bool


def _turn(x: Tensor, signs: Tensor | None, how: _How) -> Tensor:
    """D Omega x, or Omega^T D x."""
    given, on_cpu = x.dtype, x.device.type == "cpu"
    if on_cpu and given in HALVES:
        x = x.float()  # faster there, and rounded once
    if signs is not None:
        signs = signs.to(x)
    if not on_cpu or x.dtype not in _kernels():
        y = _around(_by_products, x, signs, how)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, signs)):
        y = _around(_Differentiable.apply, x, signs, how)
    else:
        y = _native(x, signs, how)
    return y if y.dtype is given else y.to(given)


def _around(rotation: Rotation, x: Tensor, signs: Tensor | None, how: _How) -> Tensor:
    """The signs before or after a rotation that knows none."""
    if signs is None:
        return rotation(x, how)
    signs = signs[:, None] if how.rows else signs
    return rotation(x * signs, how) if how.transpose else rotation(x, how) * signs


def _by_products(x: Tensor, how: _How) -> Tensor:
    """One product with a small matrix for each pass."""
    if how.rows:
        return _by_products(x.T, how._replace(rows=False)).T
    check(x.shape[-1], how.block)
    width = x.shape[-1] if how.block is None else how.block
    orders, scale = _passes(width)
    y = x.reshape(-1, width)
    rows = y.shape[0]
    for order in reversed(orders):
        # A pass turns the last axis into the first one: after all passes each is back in place.
        K = _scaled(order, x.dtype, x.device)
        K = (K.T if how.transpose else K).expand(rows, order, order)
        y = torch.bmm(K, y.view(rows, width // order, order).mT).view(rows, width)
    return (y if scale == 1 else y.mul_(scale)).view(x.shape)


@cache
def _passes(width: int) -> tuple[tuple[int, ...], float]:
    """Orders of small matrices with the product `width`, and what is left of 1 / sqrt(width)."""
    *outer, last = factors(width)
    bits = last.bit_length() - 1
    count = max(1, math.ceil(bits / RADIX_BITS))
    orders = (*outer, *(2 ** ((bits + i) // count) for i in range(count)))
    return orders, math.prod(map(_power, orders)) / math.sqrt(width)


@cache
def _scaled(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """matrix(order) / 2^e, exact in any dtype, and no pass makes float16 overflow."""
    with torch.inference_mode(False):  # or no gradient could pass later
        return matrix(order).to(device, dtype) / _power(order)


def _power(order: int) -> int:
    """2^e, the smallest that is not below sqrt(order)."""
    return 2 ** math.ceil(math.log2(order) / 2)


class _Differentiable(torch.autograd.Function):
    """`_native` without signs. The gradient of Omega x is Omega^T g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: _How) -> Tensor:
        ctx.how = how
        return _native(x, None, how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _turn(g, None, ctx.how._replace(transpose=not ctx.how.transpose)), None


def _native(x: Tensor, signs: Tensor | None, how: _How) -> Tensor:
    """D Omega x, or Omega^T D x, for a dtype of `_kernels`."""
    x = x.contiguous()
    plan = _plan(x.shape[0 if how.rows else -1], how.block, how.transpose)
    y = x.new_empty(x.shape)
    signs = None if signs is None else signs.contiguous()
    at = None if signs is None else signs.data_ptr()
    before, after = (at, None) if how.transpose else (None, at)
    inner = x.shape[1] if how.rows else 1
    outer = x.numel() // (plan.n * max(inner, 1))
    _kernels()[x.dtype](plan, x.data_ptr(), y.data_ptr(), before, after, outer, inner)
    return y


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
def _kernels() -> dict[torch.dtype, Any]:
    """The functions of cpu.cpp by the dtype of x; none where there is no compiler."""
    native = library(SOURCE)
    if native is None:
        return {}
    kernels = {torch.float32: native.rotate_float, torch.float64: native.rotate_double}
    for kernel in kernels.values():
        kernel.restype = None
        kernel.argtypes = (POINTER(_Plan), *4 * (c_void_p,), *2 * (c_int64,))
    return kernels
