"""A code on its bitshift trellis, and how a matrix is cut into the sequences that walk it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Integer
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Code:
    """The values of all states of a bitshift trellis (QTIP), where a step brings `bits` new bits.

    A kernel may compute those of a name that it knows instead of reading the table.
    """

    name: str
    bits: int  # of a step: k V
    table: Float[Tensor, "states V"]  # float32, of 2^L states

    @property
    def L(self) -> int:
        """The bits of a state."""
        return len(self.table).bit_length() - 1

    @property
    def V(self) -> int:
        """The weights of a step."""
        return self.table.shape[1]

    @property
    def window(self) -> int:
        """The steps whose bits a state holds, the first of them perhaps in part."""
        return -(-self.L // self.bits)

    def to(self, device: torch.device) -> "Code":
        """Move the table to a device."""
        return replace(self, table=self.table.to(device))


Made = TypeVar("Made")


def kept_with_the_code(make: Callable[[Code], Made]) -> Callable[[Code], Made]:
    """What `make` makes of a code, once, for as long as there is the code."""
    made: WeakKeyDictionary[Code, Made] = WeakKeyDictionary()

    @wraps(make)
    def found(code: Code) -> Made:
        if code not in made:
            made[code] = make(code)
        return made[code]

    return found


@dataclass(frozen=True)
class Tiling:
    """How a matrix is cut into sequences: `count` tiles one below the other, of `columns` columns.

    The rows are cut as `even` of kernels/groups.py cuts them. A sequence goes through its tile row
    by row; or, where all tiles have as many weights as `order`, its step t is at place order[t] of
    the row-major steps of the tile.
    """

    count: int
    columns: int
    order: tuple[int, ...] | None = None


@cache
def places(
    order: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Integer[Tensor, " steps"]:
    """The order of a tiling as a tensor, which is not to be written to."""
    return torch.tensor(order, dtype=dtype, device=device)


def _mma() -> tuple[int, ...]:
    """The 16 x 16 tile that EXL3 has: step 8 t + i is the i-th weight of thread t of 32.

    Tensor cores take it as 16 inputs x 8 outputs twice; thread t holds of each half the inputs
    2 (t mod 4) + 0, 1, 8, 9 of output t / 4. Rows here are outputs.
    """
    places = []
    for step in range(256):
        thread, i = divmod(step, 8)
        column = 2 * (thread % 4) + i % 2 + 8 * (i // 2 % 2)
        places.append(16 * (thread // 4 + 8 * (i // 4)) + column)
    return tuple(places)


ORDERS = {"mma": _mma()}  # by the name that a file gives them
