"""Multiply vectors by a packed matrix of trellis codes, or decode it: the ctypes side of cpu.cpp.

For a few vectors W~ is never in memory, and nothing is rounded to the dtype that the reference
computes in. For more it is decoded, straight to that dtype.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int16, Int32
from torch import Tensor

from quip.kernels import threads
from quip.kernels.cuda import pointer
from quip.kernels.native import library
from quip.kernels.operation import Form, learns
from quip.kernels.trellis import Code, Tiling
from quip.kernels.trellis.tables import kept_with_the_code
from quip.kernels.trellis_matvec import reference

SOURCE = Path(__file__).with_name("cpu.cpp")
FEW = 16  # vectors: for more, products with a decoded matrix are as fast
STATES, STEP = 16, 8  # bits of a state and of a step, at most
WIDTHS = 1, 2  # weights of a step
WINDOW = 13  # bits; larger tables of pairs leave the first cache
KINDS = {"mul1": 1, "mcg": 2, "3inst": 3, "1mad": 4, "int8": 5}  # the enum Kind of walk.h
NUMBERS = {torch.float32, torch.bfloat16}  # that cpu.cpp writes as weights


class _TrellisMatvec(ctypes.Structure):
    """The struct TrellisMatvec of walk.h."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "steps", "tokens", "row_bytes", "group")],
        *[(name, c_int64) for name in ("tiles", "across")],
        *[(name, c_void_p) for name in ("words", "x", "scales", "table")],
        *[(name, c_void_p) for name in ("halves", "pairs", "circuits", "out")],
        *[(name, c_int32) for name in ("bits", "state_bits", "width", "kind")],
        *threads.FIELDS,
    )


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    code: Code,
    scales: Float[Tensor, " groups"],
    tiling: Tiling,
    *,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T in float32, without a gradient; `dtype` plays no part."""
    x = x.detach().contiguous()
    y = x.new_empty(*x.shape[:-1], len(words))
    _call("multiply_trellis", x, words, code, scales, tiling, group, y, reads=True)
    return y


def decode(
    words: Int32[Tensor, "m words"],
    code: Code,
    scales: Float[Tensor, " groups"],
    tiling: Tiling,
    *,
    n: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m {n}"]:
    """W~, computed in float32 and rounded to `dtype`."""
    W = torch.empty(len(words), n, dtype=dtype if dtype in NUMBERS else torch.float32)
    _call("decode_trellis", W, words, code, scales, tiling, group, W)
    return W.to(dtype)


multiply_decoded = partial(reference.multiply, decode=decode)


def _call(
    name: str,
    x: Tensor,
    words: Tensor,
    code: Code,
    scales: Tensor,
    tiling: Tiling,
    group: int | None,
    to: Tensor,
    *,
    reads: bool = False,
) -> None:
    """A function of cpu.cpp, which writes to `to`; one that `reads` x wants tables of halves."""
    n, words, scales = x.shape[-1], words.contiguous(), scales.detach().float().contiguous()
    down = tiling.columns == code.V  # a step is a row, and the next row the next step
    table = halves(code) if reads else None
    tables = (pairs(code), circuits(code)) if reads and down else (None, None)
    call = _TrellisMatvec(
        len(words),
        n // code.V,
        x.numel() // n,
        4 * words.shape[1],
        min(group or n, n),  # a file may name any
        tiling.count,
        tiling.columns // code.V,
        words.data_ptr(),
        x.data_ptr(),
        scales.data_ptr(),
        code.table.data_ptr(),
        pointer(table),
        *map(pointer, tables),
        to.data_ptr(),
        code.bits,
        code.L,
        code.V,
        KINDS.get(code.name, 0),
        *threads.threads(),
    )
    native = library(SOURCE)
    assert native is not None
    getattr(native, name)(ctypes.byref(call), to.itemsize)


@kept_with_the_code
def halves(code: Code) -> Int16[Tensor, "states V"] | None:
    """The bits of the table in float16; None where it has other numbers."""
    numbers = code.table.detach().half()
    return numbers.view(torch.int16) if torch.equal(numbers.float(), code.table) else None


@kept_with_the_code
def pairs(code: Code) -> Int16[Tensor, "windows 2"] | None:
    """Two halves for each window of L + bits bits: of a row, and those of the next one.

    None where they would be many, or two codes more than a byte, or a step has two weights already.
    """
    table = halves(code)
    if table is None or code.V > 1 or code.bits > STEP // 2 or code.L + code.bits > WINDOW:
        return None
    window = torch.arange(len(table) << code.bits)
    return table[torch.stack([window >> code.bits, window & (len(table) - 1)], 1), 0]


@kept_with_the_code
def circuits(code: Code) -> Int16[Tensor, " halves"] | None:
    """Pairs of 2^12 states of 2 bits a step, in 34 KiB where `pairs` would take 64.

    States (u, e) of the same last 10 bits e are followed by (e, c): a circuit through four of the
    former and four of the latter in turn has each of them beside each of the others once.
    """
    table = halves(code)
    if table is None or (code.V, code.L, code.bits) != (1, 12, 2):
        return None
    before, after = table.view(4, -1).T, table.view(-1, 4)
    circuit = table.new_empty(len(after), 17)
    for u in range(4):
        for c in range(4):
            turned = (u ^ c) & 1
            at = 2 * (((u >> 1) ^ (turned & (c == 3))) << 2 | c) + turned
            both = (before[:, u], after[:, c])
            circuit[:, at], circuit[:, at + 1] = both[::-1] if turned else both
    return circuit.flatten()


def _serves(
    x: Tensor, words: Tensor, code: Code, scales: Tensor, tiling: Tiling, **_: object
) -> bool:
    n = x.shape[-1]
    few = 0 < x.numel() <= FEW * n and x.dtype == torch.float32
    return few and not learns(x) and _read(words, code, scales, tiling, n=n)


def _serves_many(
    x: Tensor, words: Tensor, code: Code, scales: Tensor, tiling: Tiling, **_: object
) -> bool:
    return x.numel() > 0 and _read(words, code, scales, tiling, n=x.shape[-1])


def _read(
    words: Tensor, code: Code, scales: Tensor, tiling: Tiling, *, n: int, **_: object
) -> bool:
    """Whether cpu.cpp reads such a matrix."""
    if code.V not in WIDTHS or code.L > STATES or code.bits > STEP or tiling.order is not None:
        return False
    here = words.is_cpu and words.numel() > 0 and n % tiling.columns == 0
    return here and code.table.is_contiguous() and not learns(code.table, scales)


FORM = Form(multiply, _serves, lambda: library(SOURCE) is not None)
DECODED = Form(multiply_decoded, _serves_many, lambda: library(SOURCE) is not None)
DECODE = Form(decode, _read, lambda: library(SOURCE) is not None)
