"""Values of trellis codes as the product on CUDA multiplies them: unit (q - middle), of integers q.

Those of some codes are sums of the bytes of a product with the state, which the kernel computes.
Those of all others come from a table, and are rounded to 16 bits of their range. A kernel has codes
of 3 bits as 4, and looks four of them up together.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Int16, Int64
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quip.kernels.trellis import Code

# Factor, increment, and what counts of each byte
HASHES = {
    "mul1": (0x83DCD12D, 0, 0xFF),
    "1mad": (34038481, 76625530, 0xFF),
    "int8": (0xCBAC1FED, 0, 0x3F),
}
WIDE = 16  # bits of a state that is multiplied
PARTS = 2  # bytes of x
STRIPS, SPACED = 8, 132  # as in cuda.cu
NIBBLES = 4  # codes of 3 bits, of a state of 12 bits at most
PAIRS = 2**16  # bytes of a table of two rows' values, at most
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


@dataclass(frozen=True)
class Values:
    """Values as unit (q - middle), where q are the integers that the kernel multiplies."""

    kind: Kind
    unit: float
    middle: float
    factor: int = 0
    increment: int = 0
    table: Int16[Tensor, " entries"] | None = None

    def bytes(self, bits: int, tokens: int) -> int:
        """Bytes that a block needs for the table and the sums of its warps."""
        entries = 0 if self.table is None else len(self.table)
        table = 4 * entries << bits if self.kind is Kind.PAIRS else 2 * entries
        sums = self.kind.warps * tokens * PARTS * self.kind.digits * SPACED
        return table + 8 * (STRIPS + tokens) + 4 * sums


_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of tables, which stay as they are


def values_of(code: Code) -> Values | None:
    """What the kernel is to know of a code; None where it cannot make its values."""
    made = _made.setdefault(code.table, {})
    if (code.name, code.bits) not in made:
        made[code.name, code.bits] = _hashed(code) or _tabled(code)
    return made[code.name, code.bits]


def _hashed(code: Code) -> Values | None:
    """The sums of bytes of a code that has such values; None where a table has others."""
    if code.name not in HASHES or code.L != WIDE or code.bits == 3:
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


def _tabled(code: Code) -> Values | None:
    """Values of the table in steps of 2^-16 of their range."""
    most = 3 * NIBBLES if code.bits == 3 else WIDE
    if most < code.L:
        return None
    C = code.table[:, 0].cpu().double()
    low, high = C.min(), C.max()
    unit = float((high - low).clamp(min=1e-30)) / 0xFFFF
    table = ((C - low) / unit).round().int().to(torch.int16)
    if code.bits == 3:
        codes = torch.arange(2**WIDE)[:, None] >> 4 * torch.arange(NIBBLES) & 7
        table = table[(codes << 3 * torch.arange(NIBBLES)).sum(1) % len(table)]
    pairs = code.bits != 3 and 4 * len(table) << code.bits <= PAIRS
    kind = Kind.PAIRS if pairs else Kind.TABLE
    return Values(kind, unit, -float(low) / unit, table=table.to(code.table.device))
