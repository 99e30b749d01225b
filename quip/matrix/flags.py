"""What may be said of a recipe on a command line: every flag once, with its help. No torch.

The command line, `build_recipe`, the descriptions of tables and the documents read this table.
Which flags a part of a recipe reads is said by the part (quip.matrix.books, quip.matrix.build).
"""

from dataclasses import Field, dataclass, fields
from functools import partial
from typing import Any

from quip.errors import UsageError, short, shown
from quip.matrix.flags_of_codes import FlagsOfCodes
from quip.matrix.methods import EXTRAS, ROTATIONS, UNROTATED
from quip.matrix.said import MOST, bad_rho, flag, number_or_auto

of_processing = partial(flag, "incoherence processing")


@dataclass(frozen=True, kw_only=True)
class Flags(FlagsOfCodes):
    """What may be said of a recipe on a command line; the names are those of the flags."""

    incoh_processing: bool = of_processing(
        "QuIP's processing: short for --pre_gptqH --pre_rescale --pre_proj --qfn b", kind=bool
    )
    pre_gptqH: bool = of_processing(
        "accepted and ignored: H is always damped by --percdamp (0 turns it off)", kind=bool
    )
    pre_rescale: bool = of_processing(
        "rescale the inputs, to balance W against H (--incoh_processing does)", kind=bool
    )
    pre_rescale_out: bool = of_processing(
        "rescale the outputs of a rotated matrix, to balance its rows against what the loss feels "
        "of each; that comes from a pass forward and back before the walk, as of --token_weights",
        kind=bool,
    )
    pre_proj: bool = of_processing(
        "rotate W and H by random orthogonal matrices (--incoh_processing and lattices do)",
        kind=bool,
    )
    pre_proj_extra: int | None = of_processing(
        "the rotation: 1, the default, a Kronecker product of two factors; 0 a factor for each "
        "block; 2 as 0, without permutations",
        kind=int,
        choices=tuple(range(len(EXTRAS))),
    )
    rotation: str | None = of_processing(
        "the rotation by name: kronecker (QuIP), blocked (a factor for each block), hadamard "
        "(QuIP#: random signs and a Hadamard matrix; the default for lattices, vq and trellis), or "
        "none in place of that default",
        choices=(*ROTATIONS, UNROTATED),
    )
    hadamard_block: int | None = of_processing(
        "one Hadamard matrix for every N columns, where none fits them all",
        kind=int,
        metavar="N",
        refuse=lambda n: n < 2 and "a block has at least 2 columns",
    )
    qfn: str | None = of_processing(
        "the grid: a, from the smallest to the largest weight of each row; b, symmetric about 0 "
        "with a range of rho RMS (for rotated weights; the default with --incoh_processing)",
        choices=("a", "b"),
    )
    range_: str | None = of_processing(
        "what the range of grid b or the scale of a lattice or trellis is fitted to: the whole "
        "matrix once (the default with --faithful), or the running weights of each column (the "
        "default; a lattice or trellis: of 8) or of every N columns as the rounding reaches them",
        metavar="{tensor,column,N}",
        refuse=lambda word: (
            len(str(word)) > 9 and "say tensor, or fewer than 1,000,000,000 columns"
        ),
    )
    rho: float | str | None = of_processing(
        "grid b reaches X times the RMS of the weights (default: of ten values around the Gaussian "
        "optimum, the one with the smallest squared error at each fit; 2.4 for nearest and with "
        "--faithful); auto: quantize each matrix with the default and with each of seven fixed "
        "values, and keep the result with the smallest proxy loss",
        kind=number_or_auto,
        metavar="{X,auto}",
        refuse=bad_rho,
    )
    faithful: bool = of_processing(
        "the paper's algorithm as printed: weights clipped before feedback, and for grid b one "
        "range of 2.4 RMS for the matrix; for lattices one published scale for the matrix; for vq "
        "no rotation, and groups of an eighth of a bit",
        kind=bool,
    )

    def check(self) -> None:
        """Raise UsageError for a value that is none, alone."""
        for name, one in FLAGS.items():
            value, said = getattr(self, one.name), one.metadata["said"]
            if value is None or name == "wbits":  # bits: those that the codebook has
                continue
            if said.choices is not None and value not in said.choices:
                raise UsageError(
                    f"--{name} {short(value)}: not one of {', '.join(map(str, said.choices))}"
                )
            if isinstance(value, int) and value >= MOST:
                raise UsageError(f"--{name} {shown(value)}: a number below {MOST:,} is needed")
            if said.refuse is not None and (wrong := said.refuse(value)):
                raise UsageError(f"--{name} {short(value)}: {wrong}")


FLAGS: dict[str, Field[Any]] = {one.name.rstrip("_"): one for one in fields(Flags)}  # as one types
IGNORED = ("lazy_batch", "pre_gptqH")  # so that the command lines of the papers' code run
