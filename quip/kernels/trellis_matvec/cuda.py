"""Multiply vectors by a matrix of packed trellis codes, or decode it, on CUDA: by cuda.cu.

A few vectors are multiplied by codes of 2 or 4 bits on tiles of one column, in half precision:
what MUL1, 1MAD and INT8 compute of a state is a sum of bytes, and values of a table are rounded to
16 bits of their range. MUL1's sums are not rounded to float16 as its values are, which is 2^-12 of
the largest. For all else W~ is decoded, exactly.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from jaxtyping import Float, Int16, Int32, Int64
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import WeakTensorKeyDictionary

from quip.kernels import cuda
from quip.kernels.cuda import block_bytes, pointer, processors
from quip.kernels.few_tokens import FEW, LONGEST, Split, split
from quip.kernels.numbers import KINDS, laid_out
from quip.kernels.operation import Form, learns
from quip.kernels.trellis import Code, Tiling
from quip.kernels.trellis import cuda as walks

SOURCE = Path(__file__).with_name("cuda.cu")
HASHES = {"mul1": (0x83DCD12D, 0, 0xFF), "1mad": (34038481, 76625530, 0xFF)} | {
    "int8": (0xCBAC1FED, 0, 0x3F),  # factor, increment, and what counts of each byte
}
BITS = (2, 4)  # of a step
WIDE = 16  # bits of a state that is multiplied
OWN, STRIPS, SPACED, CHUNK, COLUMNS = 16, 8, 132, 16, 8  # as in cuda.cu
PARTS = 2  # bytes of x
PAIRS = 2**16  # bytes of a table of two rows' values, at most
LAUNCHES = 4  # for more, the matrix product of a decoded matrix is faster
ROUNDING = 2**-11  # of the largest value: that of float16


class Kind(IntEnum):
    """How values are made of states: the switch of cuda.cu."""

    BYTES, SIX_BITS, TABLE, PAIRS = range(4)

    @property
    def digits(self) -> int:
        """Columns of a byte of x: one for each byte of a value that comes from a table."""
        return 1 if self < Kind.TABLE else 2

    @property
    def warps(self) -> int:
        """Warps of a block, of which a multiprocessor holds 16 or 12."""
        return 8 if self < Kind.TABLE else 12


class _Product(ctypes.Structure):
    """The struct Product of cuda.cu."""

    _fields_ = (
        ("inputs", Split),
        *[(name, c_int64) for name in ("m", "tiles", "row_bytes")],
        *[(name, c_void_p) for name in ("words", "table", "y")],
        *[(name, c_float) for name in ("unit", "middle")],
        *[(name, c_uint32) for name in ("factor", "increment")],
        *[(name, c_int32) for name in ("L", "y_kind", "layers")],
    )


@dataclass(frozen=True)
class Values:
    """Values as unit (q - middle), where q are the integers that the kernel multiplies."""

    kind: Kind
    unit: float
    middle: float
    factor: int = 0
    increment: int = 0
    table: Int16[Tensor, " states"] | None = None

    def bytes(self, code: Code, tokens: int) -> int:
        """Bytes that a block needs for the table and the sums of its warps."""
        table = {Kind.TABLE: 2 << code.L, Kind.PAIRS: 4 << code.L + code.bits}.get(self.kind, 0)
        sums = self.kind.warps * tokens * PARTS * self.kind.digits * SPACED
        return table + 8 * (STRIPS + tokens) + 4 * sums


_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of tables, which stay as they are


def values_of(code: Code) -> Values:
    """What the kernel is to know of a code."""
    made = _made.setdefault(code.table, {})
    if (code.name, code.bits) not in made:
        made[code.name, code.bits] = _hashed(code) or _tabled(code)
    return made[code.name, code.bits]


def _hashed(code: Code) -> Values | None:
    """The sums of bytes of a code that has such values; None where a table has others."""
    if code.name not in HASHES or code.L != WIDE:
        return None
    factor, increment, counted = HASHES[code.name]
    q, C = _sums(factor, increment, counted).double(), code.table[:, 0].cpu().double()
    off = q - q.mean()
    unit = off @ C / (off @ off)
    middle = q.mean() - C.mean() / unit
    if float((unit * (q - middle) - C).abs().max()) > ROUNDING * float(C.abs().max()):
        return None
    kind = Kind.BYTES if counted == 0xFF else Kind.SIX_BITS
    return Values(kind, float(unit), float(middle), factor, increment)


def _sums(factor: int, increment: int, counted: int) -> Int64[Tensor, " states"]:
    """What is counted of the bytes of a product with each state."""
    products = (torch.arange(2**WIDE) * factor + increment) & 0xFFFFFFFF
    return torch.stack([products >> shift & counted for shift in (0, 8, 16, 24)]).sum(0)


def _tabled(code: Code) -> Values:
    C = code.table[:, 0].cpu().double()
    low, high = C.min(), C.max()
    unit = float((high - low).clamp(min=1e-30)) / 0xFFFF
    table = ((C - low) / unit).round().int().to(torch.int16).to(code.table.device)
    kind = Kind.PAIRS if 4 << code.L + code.bits <= PAIRS else Kind.TABLE
    return Values(kind, unit, -float(low) / unit, table=table)


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
    """x W~^T for a few vectors, which are rounded to 16 bits; for more, with W~ in `dtype`."""
    n, m = x.shape[-1], len(words)
    if dtype == torch.float32 or not _are_few(x, m, code, tiling):
        W = decode(words, code, scales, tiling, n=n, group=group, dtype=dtype)
        return linear(x.to(dtype), W).to(x.dtype)
    values, X = values_of(code), laid_out(x.reshape(-1, n))
    factors = laid_out((scales if scales.dtype in KINDS else scales.float()).detach())
    together = X.split(COLUMNS // (PARTS * values.kind.digits))
    words = words.contiguous()
    done = [_multiply(part, words, code, values, factors, group or n, tiling) for part in together]
    return (done[0] if len(done) == 1 else torch.cat(done)).view(*x.shape[:-1], m)


def _multiply(
    X: Float[Tensor, "tokens n"],
    words: Int32[Tensor, "m words"],
    code: Code,
    values: Values,
    factors: Float[Tensor, " groups"],
    factor_columns: int,
    tiling: Tiling,
) -> Float[Tensor, "tokens m"]:
    """The products with as many vectors as tensor cores take at once."""
    (tokens, n), m = X.shape, len(words)
    layers = _layers(m, n, code, tiling, values.kind, X.device)
    inputs, room = split(X, PARTS, factors, factor_columns)
    y = X.new_empty(layers, tokens, m, dtype=X.dtype if layers == 1 else torch.float32)
    call = _Product(
        inputs=inputs,
        m=m,
        tiles=tiling.count,
        row_bytes=4 * words.shape[1],
        words=pointer(words),
        table=pointer(values.table),
        y=pointer(y),
        unit=values.unit,
        middle=values.middle,
        factor=values.factor,
        increment=values.increment,
        L=code.L,
        y_kind=KINDS[y.dtype],
        layers=layers,
    )
    kind = int(values.kind)
    cuda.launch(SOURCE, "multiply_trellis", X.device, ctypes.byref(call), code.bits, kind)
    del room  # whoever gets it next writes after the product has read it: one stream
    return y[0] if layers == 1 else y.sum(0).to(X.dtype)


def _layers(m: int, n: int, code: Code, tiling: Tiling, kind: Kind, device: torch.device) -> int:
    """Parts of the columns, so that blocks of few rows are as many as can run at once."""
    strips = tiling.count * -(-(-(-m // tiling.count)) // OWN)
    chunks, blocks = -(-n * code.bits // (8 * CHUNK)), -(-strips // STRIPS)
    at_once = _processors(device) * (2 if kind < Kind.TABLE else 1)
    return max(1, min(at_once // blocks, chunks // kind.warps))


def _processors(device: torch.device) -> int:
    return processors(device) if device.type == "cuda" else 1


def _are_few(x: Tensor, m: int, code: Code, tiling: Tiling) -> bool:
    """Whether the kernel multiplies them, and needs no gradient for it."""
    n = x.shape[-1]
    down = tiling.columns == code.V == 1 and tiling.order is None and m // tiling.count >= 2 * OWN
    fits = code.bits in BITS and code.L <= WIDE and n % 32 == 0 and 0 < n <= LONGEST
    few = x.dtype in KINDS and 0 < x.numel() <= FEW * n and not learns(x)
    if not (down and fits and few):
        return False
    values = values_of(code)
    together = COLUMNS // (PARTS * values.kind.digits)
    room = x.device.type != "cuda" or values.bytes(code, together) <= block_bytes(x.device)
    return room and x.numel() <= LAUNCHES * together * n


def decode(
    words: Int32[Tensor, "m words"],
    code: Code,
    scales: Float[Tensor, " groups"],
    tiling: Tiling,
    *,
    n: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m n"]:
    """W~ rounded to `dtype`, in one pass."""
    W = words.new_empty(len(words), n, dtype=dtype)
    scales = scales.detach().float().contiguous()
    rows = words.contiguous()
    walks.decode_planes(rows, code, tiling, W, stored=code.bits, scales=scales, group=group)
    return W


def _multiplies(
    x: Tensor,
    words: Tensor,
    code: Code,
    scales: Tensor,
    tiling: Tiling,
    *,
    group: int | None,
    dtype: torch.dtype,
) -> bool:
    n = x.shape[-1]
    return x.numel() > 0 and _decodes(words, code, scales, tiling, n=n, group=group, dtype=dtype)


def _decodes(
    words: Tensor,
    code: Code,
    scales: Tensor,
    tiling: Tiling,
    *,
    n: int,
    group: int | None,
    dtype: torch.dtype,
) -> bool:
    return dtype in KINDS and n > 0 and walks.decodable(words, n, code, scales)


def available() -> bool:
    """Whether torch has a CUDA device at hand, and both sources compile for it."""
    return cuda.available(SOURCE) and walks.available()


MULTIPLY = Form(multiply, _multiplies, available)
DECODE = Form(decode, _decodes, walks.available)
