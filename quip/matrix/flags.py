"""What may be said of a recipe on a command line: every flag once, with its help. No torch.

The command line, `build_recipe`, the descriptions of tables and the documents read this table.
Which flags a part of a recipe reads is said by the part (quip.matrix.books, quip.matrix.build).
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from quip.codebooks.names import CODEBOOKS, INTEGERS
from quip.errors import UsageError
from quip.matrix.methods import EXTRAS, METHODS, ROTATIONS


@dataclass(frozen=True, kw_only=True)
class Said:
    """What is known of a flag beside its name and default."""

    help: str
    group: str  # of the help
    kind: Callable[[str], Any]  # makes its value of a word; bool: a switch, which has none
    metavar: str | None
    choices: Collection[Any] | None
    refuse: Callable[[Any], str | None] | None  # what is wrong with a value


def flag(
    words: str,
    *,
    group: str,
    default: Any = None,
    kind: Callable[[str], Any] = str,
    metavar: str | None = None,
    choices: Collection[Any] | None = None,
    refuse: Callable[[Any], str | None] | None = None,
) -> Any:
    """A field of `Flags`."""
    said = Said(help=words, group=group, kind=kind, metavar=metavar, choices=choices, refuse=refuse)
    return field(default=default, metadata={"said": said})


def switch(words: str, *, group: str) -> Any:
    """A field of `Flags` that is on or off."""
    return flag(words, group=group, default=False, kind=bool)


def number_or_auto(word: str) -> float | str:
    """A number, where the word is one; what else is no good is refused with all other values."""
    try:
        return float(word)
    except ValueError:
        return word


def _share(x: float) -> str | None:
    return None if 0 <= x < math.inf else "damping is a finite share, 0 or more"


def _rho(x: float | str) -> str | None:
    good = x == "auto" if isinstance(x, str) else 0 < x < math.inf
    return None if good else "a positive number or auto is needed"


def _scale(x: float) -> str | None:
    if isinstance(x, str) or not 0 < x < math.inf:
        return "a positive number is needed"
    return None if 0.01 <= x <= 100 else "scales of lattices lie between 0.01 and 100"


def _block(x: int) -> str | None:
    return "a block has at least 2 columns" if x < 2 else None


def _group(x: int) -> str | None:
    return "a group has at least one column" if x < 1 else None


def _passes(x: int) -> str | None:
    return "it cannot be negative" if x < 0 else None


METHOD, CODEBOOK, INCOHERENCE = "method", "codebook", "incoherence processing"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What may be said of a recipe on a command line; the names are those of the flags."""

    wbits: int | None = flag(
        "bits per weight; 16, the default, evaluates the model as it is (a lattice has its own: "
        "leave it out)",
        group=METHOD,
        kind=int,
        choices=(*range(2, 9), 16),
    )
    quant: str = flag(
        "how weights are rounded: nearest; gptq (OPTQ); ldlq (QuIP, the default); ldlqRG (LDLQ by "
        "diag(H), then greedy passes); allbal (greedy passes alone); ldlbal_admm (QuIP's Algorithm "
        "5)",
        group=METHOD,
        default="ldlq",
        choices=tuple(METHODS),
    )
    npasses: int | None = flag(
        "greedy passes over the columns: by default 10 for ldlqRG and allbal, else 2 for lattices "
        "after feedback (10 with --faithful) and 0 for grids",
        group=METHOD,
        kind=int,
        metavar="N",
        refuse=_passes,
    )
    unbiased: bool = switch("round at random, so that the mean is exact", group=METHOD)
    groupsize: int | None = flag(
        "columns of a row that share one range in grid a (by default the whole row)",
        group=METHOD,
        kind=int,
        metavar="N",
        refuse=_group,
    )
    percdamp: float = flag(
        "what is added to the diagonal of H, as a share of its mean (default 0.01); ten times more "
        "after each failed factorisation, three times at most",
        group=METHOD,
        default=0.01,
        kind=float,
        metavar="X",
        refuse=_share,
    )
    lazy_batch: bool = switch(
        "accepted and ignored: updates are always blocked, with the same codes", group=METHOD
    )
    codebook: str = flag(
        "what weights are rounded to: int, the default, one of 2^wbits levels each; or eight "
        "together to a point of a lattice: E8P12 (2 bits), E8P12RVQ3B (3), E8P12RVQ4B (4). A "
        "lattice brings its own --wbits, --rotation hadamard, two greedy passes after feedback "
        "(--npasses) and stacks of q, k and v (--no_fuse)",
        group=CODEBOOK,
        default=INTEGERS,
        choices=tuple(CODEBOOKS),
    )
    scale: str | None = flag(
        "auto: quantize each matrix with several scales of the lattice, and keep the one with the "
        "smallest proxy loss",
        group=CODEBOOK,
        choices=("auto",),
    )
    scale_override: float | None = flag(
        "the RMS that weights have when they meet the lattice (default: of six values around the "
        "Gaussian optimum, the one with the smallest squared error at each fit; with --faithful "
        "the published one)",
        group=CODEBOOK,
        kind=float,
        metavar="X",
        refuse=_scale,
    )
    resid_scale_override: float | None = flag(
        "by how much the second stage of a lattice magnifies what the first one left (default: 2.1 "
        "at 3 bits, 3.8 at 4; with --faithful the published 2.04 and 3.45)",
        group=CODEBOOK,
        kind=float,
        metavar="X",
        refuse=_scale,
    )
    no_fuse: bool = switch(
        "quantize q, k and v, and up and gate, one by one instead of stacked (lattices only)",
        group=CODEBOOK,
    )
    incoh_processing: bool = switch(
        "QuIP's processing: short for --pre_gptqH --pre_rescale --pre_proj --qfn b",
        group=INCOHERENCE,
    )
    pre_gptqH: bool = switch(
        "accepted and ignored: H is always damped by --percdamp (0 turns it off)",
        group=INCOHERENCE,
    )
    pre_rescale: bool = switch(
        "rescale the inputs, to balance W against H (--incoh_processing does)", group=INCOHERENCE
    )
    pre_proj: bool = switch(
        "rotate W and H by random orthogonal matrices (--incoh_processing and lattices do)",
        group=INCOHERENCE,
    )
    pre_proj_extra: int | None = flag(
        "the rotation: 1, the default, a Kronecker product of two factors; 0 a factor for each "
        "block; 2 as 0, without permutations",
        group=INCOHERENCE,
        kind=int,
        choices=tuple(range(len(EXTRAS))),
    )
    rotation: str | None = flag(
        "the rotation by name: kronecker (QuIP), blocked (a factor for each block), hadamard "
        "(QuIP#: random signs and a Hadamard matrix; the default for lattices)",
        group=INCOHERENCE,
        choices=tuple(ROTATIONS),
    )
    hadamard_block: int | None = flag(
        "one Hadamard matrix for every N columns, where none fits them all",
        group=INCOHERENCE,
        kind=int,
        metavar="N",
        refuse=_block,
    )
    qfn: str | None = flag(
        "the grid: a, from the smallest to the largest weight of each row; b, symmetric about 0 "
        "with a range of rho RMS (for rotated weights; the default with --incoh_processing)",
        group=INCOHERENCE,
        choices=("a", "b"),
    )
    range_: str | None = flag(
        "what the range of grid b or the scale of a lattice is fitted to: the whole matrix once "
        "(the default with --faithful), or the running weights of each column (the default; a "
        "lattice: of 8) or of every N columns as the rounding reaches them",
        group=INCOHERENCE,
        metavar="{tensor,column,N}",
    )
    rho: float | str | None = flag(
        "grid b reaches X times the RMS of the weights (default: of ten values around the Gaussian "
        "optimum, the one with the smallest squared error at each fit; 2.4 for nearest and with "
        "--faithful); auto: quantize each matrix with the default and with each of seven fixed "
        "values, and keep the result with the smallest proxy loss",
        group=INCOHERENCE,
        kind=number_or_auto,
        metavar="{X,auto}",
        refuse=_rho,
    )
    faithful: bool = switch(
        "the paper's algorithm as printed: weights clipped before feedback, and for grid b one "
        "range of 2.4 RMS for the matrix; for lattices one published scale for the matrix",
        group=INCOHERENCE,
    )

    def check(self) -> None:
        """Raise UsageError for a value that is none, alone."""
        for name, one in FLAGS.items():
            value, said = getattr(self, one.name), one.metadata["said"]
            if value is None or name == "wbits":  # bits: those that the codebook has
                continue
            if said.choices is not None and value not in said.choices:
                raise UsageError(
                    f"--{name} {value}: not one of {', '.join(map(str, said.choices))}"
                )
            if said.refuse is not None and (wrong := said.refuse(value)):
                raise UsageError(f"--{name} {value}: {wrong}")


FLAGS: dict[str, Field[Any]] = {one.name.rstrip("_"): one for one in fields(Flags)}  # as one types
IGNORED = ("lazy_batch", "pre_gptqH")  # so that the command lines of the papers' code run


def as_line(flags: Mapping[str, Any]) -> list[str]:
    """The flags as they would stand on a command line, by the names of `Flags`."""
    words = []
    for name, value in flags.items():
        shown = name.rstrip("_")
        if isinstance(value, bool):
            words.append(f"--{shown}" if value else f"--no-{shown}")
        elif value is not None:
            words.append(f"--{shown}={value}")
    return words
