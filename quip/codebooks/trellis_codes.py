"""The values of trellis codes by name, and the size that weights should have when they meet them.

A code gives each of 2^L states s its V weights. Some are computed from x = a s + b mod 2^32:

    1mad    (the sum of the bytes of x - 510) / 147.800537,   a = 34038481, b = 76625530
    3inst   the sum of the halves of (x & 0x8FFF8FFF) ^ 0x3B603B60 as float16, and in float16,
            a = 89226354, b = 64248484
    mcg     as 3inst, a = 0xCBAC1FED, b = 0
    mul1    (1024 + the sum of the bytes of x) 0.0067673 - 10.3828, rounded to float16 once,
            a = 0x83DCD12D, b = 0
    int8    the sum of the bytes of x & 0x3F3F3F3F, less 126,   a = 0xCBAC1FED, b = 0

(1mad, 3inst: QTIP, arXiv 2406.11235; mcg, mul1: exllamav3; int8: ik_llama.cpp.) The second weight
of a step is the value of a x + b: neighbouring states would give it nearly the same one.

    hyb     row (h >> 6) & 511 of a table of pairs, h = s (s + 1) mod 2^32, of which bit 15 of h
            negates the first and bit 31 the second

and `learned` is a table of all states. Its values, and those of hyb, were fitted to Gaussian
weights by Lloyd's algorithm on the trellis (scripts/dev/draw_trellis_tables.py), for each number of
bits. QTIP leaves the second flip of hyb open: it takes a hundredth from the error at 2 bits.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from torch import Tensor

from quip.codebooks.names import LEARNED_STATES, MOST_STATES, TRELLIS_CODES, Bits
from quip.errors import QuipError
from quip.kernels.trellis import Code

TABLES = Path(__file__).with_name("trellis.safetensors")
WORD = 2**32 - 1
# RMS of Gaussian weights for the least squared error, in units of that of a computed code. Tables
# that were fitted to weights of variance 1 expect just these.
RHO = {1: 1.12, 1.5: 1.02, 2: 0.97, 2.5: 0.93, 3: 0.91, 3.5: 0.87, 4: 0.88}


def weights_per_step(name: str, bits: Bits) -> int:
    """V: the weights of a step at `bits` bits each."""
    return 2 if name == "hyb" or bits % 1 else 1


@cache
def code(name: str, bits: Bits, L: int, device: torch.device) -> Code:
    """The code of this name with 2^L states, for `bits` bits per weight.

    Raises QuipError where there is none.
    """
    _check(name, bits, L)
    V = weights_per_step(name, bits)
    if name == "learned":
        values = _table(learned_name(bits, L))
    elif name == "hyb":
        row, signs = hybrid_places(L)
        values = _table(hybrid_name(bits))[row] * signs
    else:
        values = COMPUTED[name].values(L, V)
    by_state = name in COMPUTED and V == 1
    return Code(name if by_state else "table", round(bits * V), values.contiguous().to(device))


def _check(name: str, bits: Bits, L: int) -> None:
    if name not in TRELLIS_CODES:
        raise QuipError(f"no trellis code is called {name!r}; there are {_listed(TRELLIS_CODES)}")
    if (2 * bits) % 1 or (name not in COMPUTED and bits not in RHO):
        raise QuipError(f"a trellis has no {bits} bits per weight; there are {_listed(RHO)}")
    step = round(bits * weights_per_step(name, bits))
    if not step < L <= MOST_STATES:
        raise QuipError(
            f"a state of {name} at {bits} bits has {step + 1} to {MOST_STATES} bits, not {L}"
        )
    if name == "learned" and L not in LEARNED_STATES:
        raise QuipError(f"a state of learned has {_listed(LEARNED_STATES)} bits, not {L}")


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def check_options(
    name: str,
    bits: Bits,
    states: int,
    rows: int,
    columns: int,
    group: int | None,
    order: str | None,
) -> None:
    """Raise QuipError for options of a file that make no code."""
    _check(name, bits, states)
    V = weights_per_step(name, bits)
    if columns % V:
        raise QuipError(f"{bits} bits a weight make no whole steps of {V} in {columns} columns")
    if group is not None and group % columns:
        raise QuipError(f"groups of {group} columns are no multiple of tiles of {columns}")
    if order and (rows, columns, V) != (16, 16, 1):
        raise QuipError(
            f"the order {order} is one of 16 x 16 steps, not of {rows} x {columns // V}"
        )


@cache
def target_rms(name: str, bits: Bits, L: int) -> float:
    """The RMS that weights should have when they meet the code, for the least squared error."""
    if name not in COMPUTED:
        return 1.0
    table = code(name, bits, L, torch.device("cpu")).table
    return RHO[bits] * float(table.double().square().mean().sqrt())


# Tables


def learned_name(bits: Bits, L: int) -> str:
    """What the file calls the learned table of so many bits per weight and states."""
    return f"learned-{bits:g}-{L}"


def hybrid_name(bits: Bits) -> str:
    """What the file calls the table of hyb for so many bits per weight."""
    return f"hyb-{bits:g}"


def _table(name: str) -> Float[Tensor, "rows V"]:
    with safe_open(TABLES, framework="pt") as file:
        return file.get_tensor(name).float()


def hybrid_places(L: int) -> tuple[Int64[Tensor, " states"], Float[Tensor, "states 2"]]:
    """The row of the table of hyb for each state, and the signs of its two weights."""
    s = torch.arange(2**L)
    h = (s * (s + 1)) & WORD
    flips = torch.stack([h >> 15 & 1, h >> 31 & 1], 1)
    return h >> 6 & 511, 1.0 - 2.0 * flips


# Formulas


@dataclass(frozen=True)
class Formula:
    """A code whose values are computed from words x = factor s + offset."""

    factor: int
    offset: int
    value: Callable[[Tensor], Tensor]

    def values(self, L: int, V: int) -> Float[Tensor, "states V"]:
        """All values, in float32."""
        x, found = torch.arange(2**L), []
        for _ in range(V):
            x = (self.factor * x + self.offset) & WORD  # the low bits are right if int64 overflows
            found.append(self.value(x).float())
        return torch.stack(found, 1)


def _of_sum(x: Int64[Tensor, " states"]) -> Float[Tensor, " states"]:
    return (_sum_of_bytes(x) - 510).double() / 147.800537


def _of_float16_sum(x: Int64[Tensor, " states"]) -> Float[Tensor, " states"]:
    scale, offset = _float16(torch.tensor([0x1EEE, 0xC931])).double()
    return ((1024 + _sum_of_bytes(x)) * scale + offset).half()  # rounded once: 22 bits are exact


def _of_halves(x: Int64[Tensor, " states"]) -> Float[Tensor, " states"]:
    """Signs, mantissas and low exponents of both halves are random."""
    y = (x & 0x8FFF8FFF) ^ 0x3B603B60
    return _float16(y & 0xFFFF) + _float16(y >> 16)


def _of_low_bits(x: Int64[Tensor, " states"]) -> Int64[Tensor, " states"]:
    return _sum_of_bytes(x & 0x3F3F3F3F) - 126


def _sum_of_bytes(x: Int64[Tensor, " states"]) -> Int64[Tensor, " states"]:
    return torch.stack([x >> shift & 0xFF for shift in (0, 8, 16, 24)]).sum(0)


def _float16(bits: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return bits.to(torch.int32).to(torch.int16).view(torch.float16)


COMPUTED = {
    "mcg": Formula(0xCBAC1FED, 0, _of_halves),
    "mul1": Formula(0x83DCD12D, 0, _of_float16_sum),
    "1mad": Formula(34038481, 76625530, _of_sum),
    "3inst": Formula(89226354, 64248484, _of_halves),
    "int8": Formula(0xCBAC1FED, 0, _of_low_bits),
}
