"""Products of a few vectors with packed codes on a CUDA device: the ctypes side of few_tokens.cuh.

x is rounded to 16 bits of the largest number among those that a warp multiplies, which is twice as
exact as bfloat16 at its best; to 24 bits where the product is asked for in float32. Sums are exact,
and added in one order: equal inputs give equal bits.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from quip.kernels.cuda import pointer

FEW = 16  # vectors: for more, the matrix product of a decoded matrix is faster
COLUMNS = 16  # of bytes, `parts` of them a vector, that one launch multiplies
NARROW = 8  # up to so many of them, a block may have 16 warps
LONG = 2**14  # columns, from which on it does: they share what it costs to split x
ROOM = 100 * 2**10  # bytes of a block's memory for x
UNITS = 4  # of 16 bytes a plane, that a warp reads side by side: a chunk
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the enum Kind


class Product(ctypes.Structure):
    """The struct Product of few_tokens.cuh."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "n", "tokens", "row_bytes", "plane_bytes")],
        *[(name, c_void_p) for name in ("words", "x", "factors")],
        ("factor_columns", c_int64),
        *[(name, c_void_p) for name in ("step", "zero")],
        *[(name, c_int64) for name in ("step_row", "zero_row", "group")],
        *[(name, c_void_p) for name in ("tables", "y")],
        *[(name, c_float) for name in ("middle", "unit", "second")],
        *[(name, c_int32) for name in ("factor_kind", "step_kind", "parts", "warps", "layers")],
    )


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A packed matrix as the kernels take it: W~ = step unit (codes - zero) factors."""

    words: Int32[Tensor, "m words"]
    unit_columns: int  # that 16 bytes of each plane hold
    factors: Float[Tensor, " groups"] | None = None  # shared by all rows
    factor_columns: int = 0  # that share a factor
    step: Float[Tensor, "m_or_1 groups"] | None = None
    zero: UInt8[Tensor, "m_or_1 groups"] | None = None
    group: int | None = None  # columns that share a step and a zero; None: all of a row
    tables: Int32[Tensor, "tables 256"] | None = None
    middle: float = 0.0  # the zero where there is none
    unit: float = 1.0
    second: float = 0.0  # what a second stage is multiplied by


def multiply(
    x: Float[Tensor, "*batch n"],
    matrix: Matrix,
    dtype: torch.dtype,
    start: Callable[[Product], None],
) -> Float[Tensor, "*batch m"]:
    """x W~^T in the dtype of x, by calls of `start`, each for a few of the vectors."""
    n, m = x.shape[-1], len(matrix.words)
    X = x.detach().reshape(-1, n).float().contiguous()
    if X.data_ptr() % 16:  # a part of another tensor: four numbers are read at once
        X = X.clone()
    parts = 3 if dtype == torch.float32 else 2
    done = [_multiply(part, matrix, parts, start) for part in X.split(COLUMNS // parts)]
    y = done[0] if len(done) == 1 else torch.cat(done)
    return y.view(*x.shape[:-1], m).to(x.dtype)


def _multiply(
    X: Float[Tensor, "tokens n"], matrix: Matrix, parts: int, start: Callable[[Product], None]
) -> Float[Tensor, "tokens m"]:
    (tokens, n), (m, length) = X.shape, matrix.words.shape
    warps, layers = _shared_out(n, tokens * parts, matrix.unit_columns)
    y = X.new_empty(layers, tokens, m)
    factors, step, zero = matrix.factors, matrix.step, matrix.zero
    start(
        Product(
            m=m,
            n=n,
            tokens=tokens,
            row_bytes=4 * length,
            plane_bytes=16 * n // matrix.unit_columns,
            words=matrix.words.data_ptr(),
            x=X.data_ptr(),
            factors=pointer(factors),
            factor_columns=matrix.factor_columns,
            step=pointer(step),
            zero=pointer(zero),
            step_row=_row(step),
            zero_row=_row(zero),
            group=matrix.group or 0,
            tables=pointer(matrix.tables),
            y=y.data_ptr(),
            middle=matrix.middle,
            unit=matrix.unit,
            second=matrix.second,
            factor_kind=0 if factors is None else KINDS[factors.dtype],
            step_kind=0 if step is None else KINDS[step.dtype],
            parts=parts,
            warps=warps,
            layers=layers,
        )
    )
    return y[0] if layers == 1 else y.sum(0)


def readable(x: Tensor, n: int) -> bool:
    """Whether the kernels take these vectors: a few, on CUDA, that need no gradient."""
    if x.device.type != "cuda" or x.dtype not in KINDS or n % 32:
        return False
    learns = torch.is_grad_enabled() and x.requires_grad
    return 0 < x.numel() <= FEW * n and not learns


def _shared_out(n: int, columns: int, unit_columns: int) -> tuple[int, int]:
    """Warps a block, and layers of columns: blocks that multiply different parts of x."""
    warps = 16 if n >= LONG and columns <= NARROW else 8
    chunk = UNITS * unit_columns
    rounds = max(1, ROOM // (columns * warps * chunk))  # chunks that a warp may have
    return warps, -(-n // (warps * rounds * chunk))


def _row(numbers: Tensor | None) -> int:
    """From one row to the next; 0 where one serves all."""
    return 0 if numbers is None or len(numbers) == 1 else numbers.shape[1]
