"""Products of a few vectors with packed codes on a CUDA device: the ctypes side of few_tokens.cuh.

Each x is rounded to 16 bits of its largest number, which is twice as exact as bfloat16 at its best;
to 24 bits where the product is asked for in float32. Sums are exact, and added in one order: equal
inputs give equal bits. So does a vector alone and in a batch, unless rows are so long that blocks
share them out in another way (`_shared_out`).
"""

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from quip.kernels.cuda import block_bytes, pointer
from quip.kernels.numbers import KINDS, laid_out
from quip.kernels.operation import learns

FEW = 16  # vectors: for more, the matrix product of a decoded matrix is faster
COLUMNS = 32  # of bytes, `parts` of them a vector, that one launch multiplies,
GROUPED = 16  # and by rows with steps of groups
NARROW = 8  # up to so many of them, a block may have 16 warps
LONG = 2**14  # columns, from which on it does
LONGEST = 2**16  # columns: sums of so many codes of 8 bits and bytes of x fit 32 bits
PIECE = 2**13  # columns that a block splits of a vector, about
ROOM = 100 * 2**10  # bytes of a block's memory for x, where two blocks are to have room,
BLOCK = 224 * 2**10  # and of all of it, on an H100
SHARED = 16  # columns of bytes, up to which they have registers
STEPS, TABLE, SUMS = 144, 2**15, 160  # bytes of a group, a table, and a warp's sums of a column
UNITS = 4  # of 16 bytes a plane, that a warp reads side by side: a chunk


class Split(ctypes.Structure):
    """The struct Split of split.cuh."""

    _fields_ = (
        *[(name, c_int64) for name in ("n", "tokens")],
        *[(name, c_void_p) for name in ("x", "factors")],
        ("factor_columns", c_int64),
        *[(name, c_void_p) for name in ("bytes", "scales", "sums")],
        *[(name, c_int32) for name in ("x_kind", "factor_kind", "parts", "pieces")],
    )


class Product(ctypes.Structure):
    """The struct Product of few_tokens.cuh."""

    _fields_ = (
        ("inputs", Split),
        *[(name, c_int64) for name in ("m", "row_bytes", "plane_bytes")],
        *[(name, c_void_p) for name in ("words", "step", "zero")],
        *[(name, c_int64) for name in ("step_row", "zero_row", "group")],
        *[(name, c_void_p) for name in ("tables", "y")],
        *[(name, c_float) for name in ("middle", "unit", "second")],
        *[(name, c_int32) for name in ("step_kind", "y_kind", "warps", "layers")],
    )


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A packed matrix as the kernels take it: W~ = step unit (codes - zero) factors."""

    words: Int32[Tensor, "m words"]
    unit_columns: int  # that 16 bytes of each plane hold
    factors: Float[Tensor, " groups"] | None = None  # shared by all rows
    factor_columns: int = 0  # that share a factor
    step: Float[Tensor, "m_or_1 groups"] | None = None
    zero: UInt8[Tensor, "r groups"] | None = None
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
    X = laid_out(x.reshape(-1, n))
    parts = 3 if dtype == torch.float32 else 2
    together = _together(n, parts, matrix)
    done = [_multiply(part, matrix, parts, start) for part in X.split(together)]
    return (done[0] if len(done) == 1 else torch.cat(done)).view(*x.shape[:-1], m)


def _multiply(
    X: Float[Tensor, "tokens n"], matrix: Matrix, parts: int, start: Callable[[Product], None]
) -> Float[Tensor, "tokens m"]:
    (tokens, n), (m, length) = X.shape, matrix.words.shape
    warps, layers = _shared_out(n, tokens * parts, matrix)
    inputs, room = split(X, parts, matrix.factors, matrix.factor_columns)
    y = X.new_empty(layers, tokens, m, dtype=X.dtype if layers == 1 else torch.float32)
    step, zero = matrix.step, matrix.zero
    start(
        Product(
            inputs=inputs,
            m=m,
            row_bytes=4 * length,
            plane_bytes=16 * n // matrix.unit_columns,
            words=matrix.words.data_ptr(),
            step=pointer(step),
            zero=pointer(zero),
            step_row=row_stride(step),
            zero_row=row_stride(zero),
            group=matrix.group or 0,
            tables=pointer(matrix.tables),
            y=y.data_ptr(),
            middle=matrix.middle,
            unit=matrix.unit,
            second=matrix.second,
            step_kind=0 if step is None else KINDS[step.dtype],
            y_kind=KINDS[y.dtype],
            warps=warps,
            layers=layers,
        )
    )
    del room  # whoever gets it next writes after the product has read it: one stream
    return y[0] if layers == 1 else y.sum(0).to(X.dtype)


def split(
    X: Float[Tensor, "tokens n"],
    parts: int,
    factors: Float[Tensor, " groups"] | None,
    factor_columns: int,
) -> tuple[Split, UInt8[Tensor, " bytes"]]:
    """What x times the factors of its columns is split to bytes by, and the memory for them."""
    (tokens, n), rows = X.shape, len(X) * parts
    pieces = -(-n // PIECE)
    room = X.new_empty(rows * n + 4 * tokens + 4 * rows * pieces, dtype=torch.uint8)
    start = room.data_ptr()
    split = Split(
        n=n,
        tokens=tokens,
        x=X.data_ptr(),
        factors=pointer(factors),
        factor_columns=min(factor_columns, n),
        bytes=start,
        scales=start + rows * n,
        sums=start + rows * n + 4 * tokens,
        x_kind=KINDS[X.dtype],
        factor_kind=0 if factors is None else KINDS[factors.dtype],
        parts=parts,
        pieces=pieces,
    )
    return split, room


def are_few(x: Tensor, matrix: Matrix) -> bool:
    """Whether the kernel takes them: they need no gradient, and a block has room for one."""
    few = x.dtype in KINDS and 0 < x.numel() <= FEW * x.shape[-1] and not learns(x)
    return few and _chunks(x.shape[-1], 3, 16, matrix) > 0


def _together(n: int, parts: int, matrix: Matrix) -> int:
    """Vectors of one launch: as many as a block has room for beside tables and steps."""
    most = (GROUPED if matrix.group else COLUMNS) // parts
    counts = range(most, 1, -1)
    return next((count for count in counts if _fitting(n, count * parts, matrix)[1] > 0), 1)


def _shared_out(n: int, columns: int, matrix: Matrix) -> tuple[int, int]:
    """Warps a block, and layers of columns: blocks that multiply different parts of x."""
    warps, chunks = _fitting(n, columns, matrix)
    return warps, -(-n // (chunks * UNITS * matrix.unit_columns))


def _fitting(n: int, columns: int, matrix: Matrix) -> tuple[int, int]:
    """Warps a block, and the chunks that it has room for.

    Tables take so much of a block's memory that one block is all that a processor holds beside a
    long x: it has as many warps as two.
    """
    alone = matrix.tables is not None and n >= LONG and columns <= NARROW
    warps = 16 if alone else 8
    return warps, _chunks(n, columns, warps, matrix)


def _chunks(n: int, columns: int, warps: int, matrix: Matrix) -> int:
    """Chunks of columns of bytes that a block has room for."""
    tables = 0 if matrix.tables is None else len(matrix.tables)
    steps = STEPS * -(-n // matrix.group) if matrix.group else 0
    sums = SUMS * warps * columns
    left = _block_bytes(matrix.words.device) - TABLE * tables - steps - sums
    room = min(ROOM, left) if columns <= SHARED else left
    chunk = UNITS * matrix.unit_columns
    gaps = chunk // 8 if tables else 0
    return room // (columns * (chunk + gaps))


def _block_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a block may have, less what else is in it."""
    return min(BLOCK, block_bytes(device) - 3 * 2**10) if device.type == "cuda" else BLOCK


def row_stride(numbers: Tensor | None) -> int:
    """From one row to the next; 0 where one serves all."""
    return 0 if numbers is None or len(numbers) == 1 else numbers.shape[1]
