"""Rotation by a Hadamard matrix on a CUDA device: the ctypes side of cuda.cu.

Along the last axis it is one launch, casts, signs and a bias included; but where K is large and the
vectors are many, a product of matrices with K, and S in a launch of its own. Along the first axis
it is a launch for every six bits of S, and that product.
"""

import ctypes
import math
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from quip.kernels import cuda
from quip.kernels.cuda import block_bytes, pointer
from quip.kernels.hadamard.matrices import check, factors, matrix
from quip.kernels.hadamard.shares import Shares, is_multiplied, is_short, orders
from quip.kernels.numbers import KINDS, laid_out
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cuda.cu")
AXIS_BITS = 6  # of S that a thread has in its registers


class Turn(ctypes.Structure):
    """The struct Turn of cuda.cu."""

    _fields_ = (
        *[(name, c_void_p) for name in ("x", "y", "before", "after", "bias", "K")],
        ("vectors", c_int64),
        *[(name, c_int32) for name in ("n", "order", "runs", "bits", "fold", "shares", "rows")],
        *[(name, c_int32) for name in ("x_kind", "y_kind", "bias_kind")],
        ("scale", c_float),
    )


class Axis(ctypes.Structure):
    """The struct Axis of cuda.cu."""

    _fields_ = (
        *[(name, c_void_p) for name in ("x", "y", "before", "after")],
        *[(name, c_int64) for name in ("outer", "inner", "columns")],
        ("bits", c_int32),
        ("scale", c_float),
    )


def turn(
    x: Float[Tensor, "*batch n"],
    signs: Float[Tensor, " axis"] | None,
    block: int | None,
    *,
    rows: bool,
    transpose: bool,
) -> Float[Tensor, "*batch n"]:
    """D Omega x or Omega^T D x as in reference.py, without a gradient; sums are in float32."""
    if rows:
        return _turn_rows(x, signs, block, transpose)
    return turn_vectors(x, signs, None, block, transpose=transpose, dtype=x.dtype)


def turn_vectors(
    x: Float[Tensor, "*batch n"],
    signs: Float[Tensor, " n"] | None,
    bias: Float[Tensor, " n"] | None,
    block: int | None,
    *,
    transpose: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch n"]:
    """D Omega x + bias or Omega^T D x + bias in this dtype, without a gradient."""
    x = laid_out(x)
    signs = None if signs is None else laid_out(signs.float())
    bias = None if bias is None else laid_out(bias if bias.dtype in KINDS else bias.float())
    order, runs = orders(block or x.shape[-1])
    if not is_multiplied(x.numel() // (order * runs), order):
        return _launched(x, signs, bias, order, runs, transpose, dtype)
    # K and S commute: the one that signs are next to is the kernel.
    width, K = order * runs, _kernels(order, x.device).signs
    if transpose:
        z = _launched(x, signs, None, 1, runs, True, torch.float32, width)
        z = _multiplied(K.T, z.view(-1, order, runs)).view(x.shape)
        return (z if bias is None else z.add_(bias)).to(dtype)
    z = _multiplied(K, x.float().view(-1, order, runs)).view(x.shape)
    return _launched(z, signs, bias, 1, runs, False, dtype, width)


def _launched(
    x: Tensor,
    signs: Tensor | None,
    bias: Tensor | None,
    order: int,
    runs: int,
    transpose: bool,
    dtype: torch.dtype,
    width: int | None = None,
) -> Tensor:
    """K x S / sqrt(width) in one launch; K of order 1 is none."""
    vectors, y = x.numel() // (order * runs), torch.empty_like(x, dtype=dtype)
    share, K = Shares.of(vectors, order, runs), None
    if order > 1:
        known = _kernels(order, x.device)
        K = known.codes if transpose else known.transposed
    call = Turn(
        x=x.data_ptr(),
        y=y.data_ptr(),
        before=pointer(signs) if transpose else None,
        after=None if transpose else pointer(signs),
        bias=pointer(bias),
        K=pointer(K),
        vectors=vectors,
        n=x.shape[-1],
        order=order,
        runs=runs,
        bits=runs.bit_length() - 1,
        fold=share.fold,
        shares=share.shares,
        rows=share.rows,
        x_kind=KINDS[x.dtype],
        y_kind=KINDS[dtype],
        bias_kind=0 if bias is None else KINDS[bias.dtype],
        scale=1 / math.sqrt(width or order * runs),
    )
    if is_short(order, runs):
        cuda.launch(SOURCE, "turn_short_vectors", x.device, ctypes.byref(call))
    else:
        sizes = share.threads, share.bytes
        cuda.launch(SOURCE, "turn_vectors", x.device, ctypes.byref(call), *sizes)
    return y


def _turn_rows(
    W: Float[Tensor, "n m"], signs: Tensor | None, block: int | None, transpose: bool
) -> Float[Tensor, "n m"]:
    """K by a product of matrices, and S six bits at a time."""
    W, signs = laid_out(W), None if signs is None else laid_out(signs.float())
    n, m = W.shape
    order, runs = orders(block or n)
    K = _kernels(order, W.device).signs
    if order > 1 and not transpose:
        W = _multiplied(K, W.view(-1, order, runs * m)).view(n, m)
    left, inner, y = runs.bit_length() - 1, m, torch.empty_like(W)
    passes = math.ceil(left / AXIS_BITS)
    for i in range(passes):
        bits = math.ceil(left / (passes - i))
        call = Axis(
            x=(y if i else W).data_ptr(),  # the later ones in place
            y=y.data_ptr(),
            before=pointer(signs) if transpose and i == 0 else None,
            after=pointer(signs) if not transpose and i == passes - 1 else None,
            outer=n * m // (inner << bits),
            inner=inner,
            columns=m,
            bits=bits,
            scale=1 / math.sqrt(order * runs) if i == passes - 1 else 1,
        )
        cuda.launch(SOURCE, "turn_rows", W.device, ctypes.byref(call))
        left, inner = left - bits, inner << bits
    if order > 1 and transpose:
        y = _multiplied(K.T, y.view(-1, order, runs * m)).view(n, m)
    return y


def _multiplied(K: Tensor, x: Float[Tensor, "count order inner"]) -> Tensor:
    return torch.bmm(K.expand(len(x), *K.shape), x)


class _Kernels(NamedTuple):
    """K, and K^T, as kernels and as products of matrices read it."""

    codes: Int8[Tensor, "order order"]
    transposed: Int8[Tensor, "order order"]
    signs: Float[Tensor, "order order"]


@cache
def _kernels(order: int, device: torch.device) -> _Kernels:
    """All of them at once, so that the first product makes what any other will use (ops.py).

    They are there when this returns: a kernel may read them before the one before it is done.
    """
    with torch.inference_mode(False):
        K = matrix(order).cpu()
        parts = K.contiguous(), K.T.contiguous(), K.float()
        return _Kernels(*(part.to(device) for part in parts))


def _readable(x: Tensor, block: int | None, axis: int) -> bool:
    if x.device.type != "cuda" or not x.numel():
        return False
    check(x.shape[axis], block)
    *outer, runs = factors(block or x.shape[axis])
    return len(outer) <= 1 and runs >= 4


def _serves(
    x: Tensor, signs: Tensor | None, block: int | None, *, rows: bool, transpose: bool
) -> bool:
    if rows:
        return x.dtype == torch.float32 and _readable(x, block, 0)
    return _serves_vectors(x, signs, None, block, transpose=transpose, dtype=x.dtype)


def _serves_vectors(
    x: Tensor,
    signs: Tensor | None,
    bias: Tensor | None,
    block: int | None,
    *,
    transpose: bool,
    dtype: torch.dtype,
) -> bool:
    if x.dtype not in KINDS or dtype not in KINDS or not _readable(x, block, -1):
        return False
    order, runs = orders(block or x.shape[-1])
    vectors = x.numel() // (order * runs)
    if is_multiplied(vectors, order):
        order = 1  # S is left
    if is_short(order, runs):
        return True
    return Shares.of(vectors, order, runs).bytes <= block_bytes(x.device)


FORM = Form(turn, _serves, lambda: cuda.available(SOURCE))
VECTORS = Form(turn_vectors, _serves_vectors, lambda: cuda.available(SOURCE))
