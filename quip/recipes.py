"""Which recipes there are: the papers' methods, and what a command line makes of them."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from quip.codebooks import LATTICES, Lattice, MinMaxGrid, RmsGrid, around
from quip.errors import UsageError
from quip.feedback import Feedback, admm, coordinate, ldl, none
from quip.recipe import Order, Recipe, backwards, largest_first, natural
from quip.transforms import (
    Draw,
    Hadamard,
    Kronecker,
    Rescale,
    draw_blocked,
    draw_blocked_unpermuted,
)


@dataclass(frozen=True)
class Method:
    """One row of the papers' method table."""

    order: Order
    feedback: Feedback
    passes: int  # greedy passes by default
    swept_passes: int  # passes that the sweep itself already is
    title: str


METHODS = {
    "nearest": Method(natural, none, 0, 0, "each weight to its nearest level"),
    "gptq": Method(natural, ldl, 0, 0, "OPTQ (GPTQ): LDLQ from first column to last"),
    "ldlq": Method(backwards, ldl, 0, 0, "QuIP: optimal linear feedback"),
    "ldlqRG": Method(largest_first, ldl, 10, 0, "QuIP-RG: LDLQ by diag(H), then greedy"),
    "allbal": Method(largest_first, coordinate, 10, 1, "greedy updates alone"),
    "ldlbal_admm": Method(largest_first, admm, 0, 0, "QuIP Algorithm 5, bounded feedback"),
}
EXTRAS: dict[int, Draw] = {0: draw_blocked, 1: Kronecker.draw, 2: draw_blocked_unpermuted}
KRONECKERS = {"kronecker": EXTRAS[1], "blocked": EXTRAS[0]}
ROTATIONS = (*KRONECKERS, "hadamard")
CODEBOOKS = ("int", *LATTICES)
PAPERS_RHO = 2.4  # of grid b
SHARP_RHO = 0.9  # of E8P, as the paper of QuIP# has it
SHARP_PASSES = 10  # of its code
LATTICE_PASSES = 2  # nine tenths of what any number of passes gains
LATTICE_RANGE = "8"
# (rho, ratio) around which a fit looks, best for proxy losses of rotated weights; and how far.
CENTRES = {"E8P12": (1.0, None), "E8P12RVQ3B": (0.98, 2.1), "E8P12RVQ4B": (0.9, 3.8)}
SHARES = (0.8, 0.87, 0.93, 1.0, 1.07, 1.15)


@dataclass(frozen=True, kw_only=True)
class Named:
    """A recipe by name: the flags that it stands for."""

    title: str
    flags: dict[str, Any]


RECIPES = {
    **{
        f"quip-{bits}bit": Named(
            title=f"QuIP: LDLQ with incoherence processing, {bits} bits",
            flags={"wbits": bits, "quant": "ldlq", "incoh_processing": True},
        )
        for bits in (2, 3, 4)
    },
    **{
        f"quip-sharp-{row.bits}bit": Named(
            title=f"QuIP#: block LDLQ with {name} after a Hadamard transform, {row.bits} bits",
            flags={"wbits": row.bits, "quant": "ldlq", "codebook": name},
        )
        for name, row in LATTICES.items()
    },
}


def as_flags(flags: Mapping[str, Any]) -> list[str]:
    """The flags as they would stand on a command line."""
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items()]


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
    rho: float | None = None
    scale: str | None = None
    scale_override: float | None = None
    resid_scale_override: float | None = None
    no_fuse: bool = False
    faithful: bool = False

    @property
    def rotates(self) -> bool:
        return self.pre_proj or self.incoh_processing or self.codebook != "int"

    @property
    def passes(self) -> int:
        """Greedy passes; the search for the nearest point of a lattice leaves much to them."""
        method = METHODS[self.quant]
        if self.npasses is not None:
            return self.npasses
        if self.codebook == "int" or method.feedback is none or method.passes:
            return method.passes
        return SHARP_PASSES if self.faithful else LATTICE_PASSES


def build_recipe(**flags: Any) -> Recipe:
    """The recipe of a command line, by the names of `Flags`.

    Raises UsageError where a combination means nothing.
    """
    f = Flags(**flags)
    _refuse_values(f)
    _refuse_passes(f)
    method = METHODS[f.quant]
    recipe = Recipe(
        codebook=_grid(f) if f.codebook == "int" else _lattice(f),
        transforms=_transforms(f),
        order=method.order,
        feedback=method.feedback,
        damp=f.percdamp,
        greedy_passes=f.passes - method.swept_passes,
    )
    if f.codebook != "int":
        group = None if f.faithful else _group(f.range_ or LATTICE_RANGE, least=8)
        trials = _trials(f) if f.scale == "auto" else ()
        return replace(recipe, group=group, trials=trials, stack=not f.no_fuse)
    if isinstance(recipe.codebook, MinMaxGrid):
        return replace(recipe, group=f.groupsize, clamp_target=f.faithful)
    group = None if f.faithful else _group(f.range_ or "column", least=1)
    return replace(recipe, group=group, clamp_target=f.faithful)


def _transforms(f: Flags) -> tuple[Draw, ...]:
    if f.pre_proj_extra is not None and not f.rotates:
        raise UsageError(
            f"--pre_proj_extra {f.pre_proj_extra} chooses a rotation: add --pre_proj or "
            "--incoh_processing"
        )
    if f.rotation is not None and not f.rotates:
        raise UsageError(
            f"--rotation {f.rotation} chooses a rotation: add --pre_proj or --incoh_processing"
        )
    if f.rotation is not None and f.pre_proj_extra is not None:
        raise UsageError("--rotation and --pre_proj_extra both choose a rotation: leave one out")
    lattice = f.codebook != "int" and f.pre_proj_extra is None
    rotation = f.rotation or ("hadamard" if lattice else None)
    if f.hadamard_block is not None and rotation != "hadamard":
        raise UsageError(
            f"--hadamard_block {f.hadamard_block} speaks of --rotation hadamard: add it"
        )
    draws: list[Draw] = [Rescale.draw] if f.pre_rescale or f.incoh_processing else []
    if rotation == "hadamard":
        draws.append(_hadamard(f.hadamard_block))
    elif f.rotates:
        extra = 1 if f.pre_proj_extra is None else f.pre_proj_extra
        draws.append(KRONECKERS[rotation] if rotation else EXTRAS[extra])
    return tuple(draws)


@cache
def _hadamard(block: int | None) -> Draw:
    return partial(Hadamard.draw, block=block)  # cached, so that equal recipes compare equal


def _grid(f: Flags) -> MinMaxGrid | RmsGrid:
    """The integer grid, once its flags are known to agree."""
    for flag in ("scale", "scale_override", "resid_scale_override"):
        if getattr(f, flag) is not None:
            raise UsageError(f"--{flag} speaks of a lattice: name one with --codebook E8P12")
    if f.no_fuse:
        raise UsageError("--no_fuse speaks of a lattice: matrices are fused for --codebook E8P12")
    assert f.wbits is not None
    if (f.qfn or ("b" if f.incoh_processing else "a")) == "a":
        _refuse_grid_a(f)
        return MinMaxGrid(bits=f.wbits, unbiased=f.unbiased)
    _refuse_grid_b(f)
    # A range of the least squared error shrinks weights on the whole. Feedback makes up for that;
    # without it perplexity suffers.
    fixed = f.faithful or METHODS[f.quant].feedback is none
    rhos = (f.rho,) if f.rho else (PAPERS_RHO,) if fixed else around(f.wbits)
    return RmsGrid(bits=f.wbits, unbiased=f.unbiased, rhos=rhos)


def _lattice(f: Flags) -> Lattice:
    """The lattice, once its flags are known to agree."""
    row = LATTICES[f.codebook]
    given = {"--qfn": f.qfn, "--rho": f.rho, "--groupsize": f.groupsize}
    given |= {"--unbiased": f.unbiased or None}
    for flag, value in given.items():
        if value is not None:
            raise UsageError(f"{flag} speaks of integer grids: leave it out with {f.codebook}")
    if f.quant == "ldlbal_admm":
        raise UsageError("--quant ldlbal_admm bounds the feedback of single columns: use ldlq")
    if f.resid_scale_override is not None and row.ratio is None:
        raise UsageError(f"--resid_scale_override: {f.codebook} has no second stage")
    if f.faithful and f.range_:
        raise UsageError("--faithful fixes --range tensor: leave it out")
    if f.scale == "auto" and (f.scale_override or f.faithful):
        raise UsageError("--scale auto tries several scales: leave out what fixes one")
    rho, ratio = CENTRES[f.codebook]
    rhos = tuple(round(rho * share, 4) for share in SHARES)
    if f.faithful:
        rhos, ratio = (SHARP_RHO if row.ratio is None else row.rho,), row.ratio
    if f.scale_override:
        rhos = (f.scale_override,)
    return Lattice(stages=row.stages, ratio=f.resid_scale_override or ratio, rhos=rhos)


def _trials(f: Flags) -> tuple[Lattice, ...]:
    book = _lattice(f)
    return tuple(replace(book, rhos=(rho,)) for rho in book.rhos)


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
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} {value}: a positive number is needed")
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


def _group(range_: str, *, least: int) -> int | None:
    if range_ == "tensor":
        return None
    if range_ == "column" and least == 1:
        return 1
    if range_.isdecimal() and int(range_) > 0 and int(range_) % least == 0:
        return int(range_)
    if least > 1:
        raise UsageError(f"--range {range_}: say tensor, or a multiple of {least} columns")
    raise UsageError(f"--range {range_}: say tensor, column or a number of columns")
