"""What may be said of a recipe on a command line, and what of it means nothing together."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from quip.codebooks import LATTICES
from quip.errors import UsageError
from quip.matrix.feedback import none
from quip.matrix.methods import METHODS

EXTRAS = (0, 1, 2)  # of --pre_proj_extra
ROTATIONS = ("kronecker", "blocked", "hadamard")
CODEBOOKS = ("int", *LATTICES)
SHARP_PASSES = 10  # of the published code of QuIP#
LATTICE_PASSES = 2  # nine tenths of what any number of passes gains


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What may be said of a recipe on a command line; the names are those of the flags."""

    quant: str = "ldlq"
    wbits: int | None = None  # of a lattice: those it has
    codebook: str = "int"
    incoh_processing: bool = False
    pre_rescale: bool = False
    pre_proj: bool = False
    pre_proj_extra: int | None = None
    rotation: str | None = None
    hadamard_block: int | None = None
    qfn: str | None = None
    npasses: int | None = None
    unbiased: bool = False
    groupsize: int | None = None
    percdamp: float = 0.01
    range_: str | None = None
    rho: float | str | None = None  # a number, or auto
    scale: str | None = None
    scale_override: float | None = None
    resid_scale_override: float | None = None
    no_fuse: bool = False
    faithful: bool = False

    def check(self) -> None:
        """Raise UsageError for values that are none, and for combinations that mean nothing."""
        _refuse_values(self)
        if self.codebook != "int":
            _refuse_lattice(self)
        _refuse_passes(self)
        _refuse_rotations(self)
        if self.codebook != "int":
            return
        _refuse_flags_of_lattices(self)
        if self.grid == "a":
            _refuse_grid_a(self)
        else:
            _refuse_grid_b(self)

    @property
    def grid(self) -> str:
        """The integer grid: a or b."""
        return self.qfn or ("b" if self.incoh_processing else "a")

    @property
    def rotates(self) -> bool:
        return self.pre_proj or self.incoh_processing or self.codebook != "int"

    @property
    def is_hadamard(self) -> bool:
        named = self.codebook != "int" and self.pre_proj_extra is None
        return self.rotation == "hadamard" or (named and self.rotation is None)

    @property
    def passes(self) -> int:
        """Greedy passes; the search for the nearest point of a lattice leaves much to them."""
        method = METHODS[self.quant]
        if self.npasses is not None:
            return self.npasses
        if self.codebook == "int" or method.feedback is none or method.passes:
            return method.passes
        return SHARP_PASSES if self.faithful else LATTICE_PASSES


def _refuse_values(f: Flags) -> None:
    if f.quant not in METHODS:
        raise UsageError(f"--quant {f.quant}: not one of {', '.join(METHODS)}")
    if f.codebook not in CODEBOOKS:
        raise UsageError(f"--codebook {f.codebook}: not one of {', '.join(CODEBOOKS)}")
    if f.codebook == "int":
        if f.wbits is None or not 2 <= f.wbits <= 8:
            raise UsageError(
                f"--wbits {f.wbits}: 2 to 8 bits can be quantized to (16 evaluates only)"
            )
    elif f.wbits not in (None, LATTICES[f.codebook].bits):
        bits = LATTICES[f.codebook].bits
        raise UsageError(
            f"--wbits {f.wbits}: {f.codebook} has {bits} bits; leave out --wbits, or name another "
            "--codebook"
        )
    if not 0 <= f.percdamp < math.inf:
        raise UsageError(f"--percdamp {f.percdamp}: damping is a finite share, 0 or more")
    choices: dict[str, Collection[object]] = {
        "pre_proj_extra": EXTRAS,
        "rotation": ROTATIONS,
        "qfn": ("a", "b"),
        "scale": ("auto",),
    }
    for name, allowed in choices.items():
        value = getattr(f, name)
        if value is not None and value not in allowed:
            raise UsageError(f"--{name} {value}: not one of {', '.join(map(str, allowed))}")
    for name in ("rho", "scale_override", "resid_scale_override"):
        value = getattr(f, name)
        if name == "rho" and value == "auto":
            continue
        if value is not None and (isinstance(value, str) or not 0 < value < math.inf):
            auto = " or auto" if name == "rho" else ""
            raise UsageError(f"--{name} {value}: a positive number{auto} is needed")
        if value is not None and name != "rho" and not 0.01 <= value <= 100:
            raise UsageError(f"--{name} {value}: scales of lattices lie between 0.01 and 100")
    if f.hadamard_block is not None and f.hadamard_block < 2:
        raise UsageError(f"--hadamard_block {f.hadamard_block}: a block has at least 2 columns")


def _refuse_passes(f: Flags) -> None:
    if f.passes < 0:
        raise UsageError(f"--npasses {f.passes}: it cannot be negative")
    if f.quant == "allbal" and f.passes == 0:
        raise UsageError("--quant allbal --npasses 0 would round nothing: say 1 or more")
    if f.unbiased and f.passes:
        raise UsageError(
            f"--unbiased with {f.passes} greedy passes: a pass rounds to nearest and undoes it; "
            "say --npasses 0 with ldlqRG, or leave out --unbiased"
        )


def _refuse_rotations(f: Flags) -> None:
    for name, value in (("pre_proj_extra", f.pre_proj_extra), ("rotation", f.rotation)):
        if value is not None and not f.rotates:
            raise UsageError(
                f"--{name} {value} chooses a rotation: add --pre_proj or --incoh_processing"
            )
    if f.rotation is not None and f.pre_proj_extra is not None:
        raise UsageError("--rotation and --pre_proj_extra both choose a rotation: leave one out")
    if f.hadamard_block is not None and not f.is_hadamard:
        raise UsageError(
            f"--hadamard_block {f.hadamard_block} speaks of --rotation hadamard: add it"
        )


def _refuse_flags_of_lattices(f: Flags) -> None:
    for flag in ("scale", "scale_override", "resid_scale_override"):
        if getattr(f, flag) is not None:
            raise UsageError(f"--{flag} speaks of a lattice: name one with --codebook E8P12")
    if f.no_fuse:
        raise UsageError("--no_fuse speaks of a lattice: matrices are fused for --codebook E8P12")


def _refuse_grid_a(f: Flags) -> None:
    if f.incoh_processing:
        raise UsageError("--incoh_processing means --qfn b: leave out --qfn a")
    for flag, given in (("--range", f.range_), ("--rho", f.rho)):
        if given:
            raise UsageError(
                f"{flag} speaks of the incoherent grid (--qfn b): add --incoh_processing"
            )
    if f.groupsize is not None and f.groupsize < 1:
        raise UsageError(f"--groupsize {f.groupsize}: a group has at least one column")
    if f.groupsize and f.faithful:
        raise UsageError("--faithful clips to one range before the sweep: leave out --groupsize")


def _refuse_grid_b(f: Flags) -> None:
    if not f.rotates:
        raise UsageError(
            "--qfn b needs --pre_proj: one range for the whole matrix serves only weights that "
            "a rotation has made alike; add --pre_proj (or --incoh_processing), or use --qfn a"
        )
    if f.groupsize is not None:
        raise UsageError(
            f"--groupsize {f.groupsize} with --qfn b: groups of a row share a range in grid a; "
            "say --range N for the incoherent grid"
        )
    if f.faithful and (f.range_ or f.rho):
        raise UsageError("--faithful fixes --range tensor and --rho 2.4: leave them out")


def _refuse_lattice(f: Flags) -> None:
    given = {"--qfn": f.qfn, "--rho": f.rho, "--groupsize": f.groupsize}
    given |= {"--unbiased": f.unbiased or None}
    for flag, value in given.items():
        if value is not None:
            raise UsageError(f"{flag} speaks of integer grids: leave it out with {f.codebook}")
    if f.quant == "ldlbal_admm":
        raise UsageError("--quant ldlbal_admm bounds the feedback of single columns: use ldlq")
    if f.resid_scale_override is not None and LATTICES[f.codebook].ratio is None:
        raise UsageError(f"--resid_scale_override: {f.codebook} has no second stage")
    if f.faithful and f.range_:
        raise UsageError("--faithful fixes --range tensor: leave it out")
    if f.scale == "auto" and (f.scale_override or f.faithful):
        raise UsageError("--scale auto tries several scales: leave out what fixes one")
