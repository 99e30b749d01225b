"""Values of trellis codes as the product on CUDA multiplies them: unit (q - middle), of integers q.

Those of some codes are sums of the bytes of a product with the state, which the kernel computes.
Those of all others come from a table, and are rounded to 16 bits of their range. A kernel has codes
of 3 bits as 4, and looks four of them up together.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Float64, Int16, Int64
from torch import Tensor

from quip.kernels.trellis import Code
from quip.kernels.trellis.tables import kept_with_the_code

# Factor, increment, and what counts of each byte
HASHES = {
    "mul1": (0x83DCD12D, 0, 0xFF),
    "1mad": (34038481, 76625530, 0xFF),
    "int8": (0xCBAC1FED, 0, 0x3F),
}
WIDE = 16  # bits of a state that is multiplied, and the most of one that is looked up
STRIPS, SPACED = 8, 132  # as in cuda.cu
NIBBLES = 4  # codes of 3 bits, of a state of 12 bits at most
PAIRS = 2**16  # bytes of a table of two rows' values, at most
ROUNDING = 2**-11  # of the largest value: that of float16,
NOISE = 2**-24  # and of float32


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

    def bytes(self, bits: int, tokens: int, parts: int) -> int:
        """Bytes that a block needs for the table and the sums of its warps."""
        entries = 0 if self.table is None else len(self.table)
        table = 4 * entries << bits if self.kind is Kind.PAIRS else 2 * entries
        sums = self.kind.warps * tokens * parts * self.kind.digits * SPACED
        return table + 8 * (STRIPS + tokens) + 4 * sums


Made = tuple[Values, Tensor]  # and what values they leave


@kept_with_the_code
def values_of(code: Code) -> tuple[Values, ...]:
    """What the kernel is to know of a code: values to 16 bits, as a bfloat16 product needs them.

    Then the rest, if there is any; nothing where the kernel has no values for the code.
    """
    most = 3 * NIBBLES if code.bits == 3 else WIDE
    if most < code.L:
        return ()
    C = code.table[:, 0].cpu().double()
    first, rest = _hashed(C, code) or _tabled(C, code)
    if float(rest.abs().max()) <= NOISE * float(C.abs().max()):
        return (first,)
    return first, _tabled(rest, code)[0]


def _hashed(C: Float64[Tensor, " states"], code: Code) -> Made | None:
    """The sums of bytes of a code that has such values; None where a table has others."""
    if code.name not in HASHES or code.L != WIDE or code.bits == 3:
        return None
    factor, increment, counted = HASHES[code.name]
    q = _sums(factor, increment, counted).double()
    off = q - q.mean()
    unit = off @ C / (off @ off)
    middle = q.mean() - C.mean() / unit
    rest = C - unit * (q - middle)
    if float(rest.abs().max()) > ROUNDING * float(C.abs().max()):
        return None
    kind = Kind.BYTES if counted == 0xFF else Kind.SIX_BITS
    return Values(kind, float(unit), float(middle), factor, increment), rest


def _sums(factor: int, increment: int, counted: int) -> Int64[Tensor, " states"]:
    """What is counted of the bytes of a product with each state."""
    products = (torch.arange(2**WIDE) * factor + increment) & 0xFFFFFFFF
    return torch.stack([products >> shift & counted for shift in (0, 8, 16, 24)]).sum(0)


def _tabled(C: Float64[Tensor, " states"], code: Code) -> Made:
    """Values in steps of 2^-16 of their range."""
    low, high = C.min(), C.max()
    unit = float((high - low).clamp(min=1e-30)) / 0xFFFF
    q = ((C - low) / unit).round()
    table = q.int().to(torch.int16)
    if code.bits == 3:
        codes = torch.arange(2**WIDE)[:, None] >> 4 * torch.arange(NIBBLES) & 7
        table = table[(codes << 3 * torch.arange(NIBBLES)).sum(1) % len(table)]
    pairs = code.bits != 3 and 4 * len(table) << code.bits <= PAIRS
    kind = Kind.PAIRS if pairs else Kind.TABLE
    values = Values(kind, unit, -float(low) / unit, table=table.to(code.table.device))
    return values, C - (low + unit * q)
