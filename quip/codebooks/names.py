"""The codebooks there are, in words: what command lines and files call them. No torch.

A new codebook is a file beside this one and a line in CODEBOOKS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Bits: TypeAlias = int | float  # per weight; what is whole is an int
DIM = 8  # of the lattices


@dataclass(frozen=True, kw_only=True)
class Published:
    """A codebook of QuIP#, and the rho and ratio that it was published with."""

    stages: tuple[str, ...]
    bits: int  # per weight
    rho: float
    ratio: float | None = None

    @property
    def index_bits(self) -> int:
        return DIM * self.bits


LATTICES = {
    "E8P12": Published(stages=("e8p",), bits=2, rho=1.03),
    "E8P12RVQ3B": Published(stages=("e8p", "e81b"), bits=3, rho=0.98, ratio=2.04),
    "E8P12RVQ4B": Published(stages=("e8p", "e8p"), bits=4, rho=1.03, ratio=3.45),
}


TRELLIS_CODES = ("learned", "mcg", "mul1", "1mad", "3inst", "int8", "hyb")
MOST_STATES = 16  # bits of a state
LEARNED_STATES = (8, 10, 12)  # those for which there are tables


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A codebook by name; `title` is what a list says of it."""

    title: str
    bits: tuple[Bits, ...]  # per weight, to choose from
    home: str  # the file beside this one, which is also what a checkpoint calls its decoder
    decoder: str  # the class in that file

    @property
    def only_bits(self) -> Bits | None:
        """The bits per weight of a codebook that leaves no choice, such as a lattice."""
        return self.bits[0] if len(self.bits) == 1 else None

    def widths(self, wanted: tuple[Bits, ...]) -> tuple[Bits, ...]:
        """The bits per weight to try: those wanted, or the only ones there are."""
        return wanted if self.only_bits is None else self.bits


CODEBOOKS = {
    "int": Entry(
        title="one of 2^wbits levels each", bits=tuple(range(2, 9)), home="grid", decoder="Grids"
    ),
    **{
        name: Entry(
            title=f"eight together to a point of a lattice, {row.bits} bits",
            bits=(row.bits,),
            home="lattice",
            decoder="Lattices",
        )
        for name, row in LATTICES.items()
    },
    "vq": Entry(
        title="--vq_dim neighbours together to one of 2^(wbits vq_dim) learned centroids",
        bits=tuple(range(1, 9)),
        home="learned",
        decoder="Centroids",
    ),
    "trellis": Entry(
        title="a tile of weights together, as a walk through 2^L states",
        bits=(1, 1.5, 2, 2.5, 3, 3.5, 4),
        home="trellis",
        decoder="Trellises",
    ),
}
INTEGERS = next(iter(CODEBOOKS))  # the default


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a codebook makes of the flags of a command line: itself, and what goes with it.

    `group`, `clamp_target` and `stack` are those of a Recipe. `trials` are changes of the codebook,
    each tried instead of it. `rotation` goes with it unless another one is named (None: none that
    is not asked for), and so do `passes`, greedy ones, with feedback.
    """

    codebook: Callable[[], Any]  # called when all flags are known to mean something
    trials: tuple[Mapping[str, Any], ...] = ()
    group: int | None = None
    clamp_target: bool = False
    stack: bool = False
    rotation: str | None = None
    passes: int = 0
    update: int = 0
