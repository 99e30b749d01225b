"""Which recipes there are: by name, and by the flags of a command line."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quip.codebooks import LATTICES, Codebook, Lattice, MinMaxGrid, RmsGrid, around
from quip.errors import UsageError
from quip.matrix.feedback import none
from quip.matrix.flags import Flags
from quip.matrix.methods import METHODS
from quip.matrix.polish import Greedy
from quip.matrix.recipe import Recipe
from quip.transforms import Draw, HadamardDraw, KroneckerDraw, RescaleDraw

EXTRAS: dict[int, Draw] = {
    0: KroneckerDraw(blocked=True),
    1: KroneckerDraw(),
    2: KroneckerDraw(blocked=True, permute=False),
}
KRONECKERS = {"kronecker": EXTRAS[1], "blocked": EXTRAS[0]}
PAPERS_RHO = 2.4  # of grid b
SHARP_RHO = 0.9  # of E8P, as the paper of QuIP# has it
RHO_SHARES = (0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6)
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


def build_recipe(**flags: Any) -> Recipe:
    """The recipe of a command line, by the names of `Flags`.

    Raises UsageError where a combination means nothing.
    """
    f = Flags(**flags)
    f.check()
    method = METHODS[f.quant]
    book, group = _lattice(f) if f.codebook != "int" else _grid(f)
    passes = f.passes - method.swept_passes
    recipe = Recipe(
        codebook=book,
        trials=_trials(f, book),
        transforms=_transforms(f),
        order=method.order,
        feedback=method.feedback,
        group=group,
        damp=f.percdamp,
        polish=(Greedy(passes),) if passes else (),
    )
    if isinstance(book, Lattice):
        return replace(recipe, stack=not f.no_fuse)
    return replace(recipe, clamp_target=f.faithful)


def _trials(f: Flags, book: Lattice | MinMaxGrid | RmsGrid) -> tuple[Codebook, ...]:
    """What `--scale auto` and `--rho auto` try: each rho for the whole matrix.

    Of grid b those from 0.9 to 1.6 times (bits + 1) / 2, nearly the best for Gaussian weights,
    which feedback spreads; and first the best of ten at each fit, the default with feedback, so
    that no matrix then loses more than by default.
    """
    if isinstance(book, Lattice) and f.scale == "auto":
        return tuple(replace(book, rhos=(rho,)) for rho in book.rhos)
    if isinstance(book, RmsGrid) and f.rho == "auto":
        rhos = (round(share * (book.bits + 1) / 2, 4) for share in RHO_SHARES)
        return (book, *(replace(book, rhos=(rho,)) for rho in rhos))
    return ()


def _transforms(f: Flags) -> tuple[Draw, ...]:
    draws: list[Draw] = [RescaleDraw()] if f.pre_rescale or f.incoh_processing else []
    if f.is_hadamard:
        draws.append(HadamardDraw(block=f.hadamard_block))
    elif f.rotation:
        draws.append(KRONECKERS[f.rotation])
    elif f.rotates:
        draws.append(EXTRAS[1 if f.pre_proj_extra is None else f.pre_proj_extra])
    return tuple(draws)


def _grid(f: Flags) -> tuple[MinMaxGrid | RmsGrid, int | None]:
    """The integer grid, and the columns that share one."""
    assert f.wbits is not None
    if f.grid == "a":
        return MinMaxGrid(bits=f.wbits, unbiased=f.unbiased), f.groupsize
    # A range of the least squared error shrinks weights on the whole. Feedback makes up for that;
    # without it perplexity suffers.
    fixed = f.faithful or (METHODS[f.quant].feedback is none and f.rho is None)
    given = () if f.rho in (None, "auto") else (float(f.rho),)
    rhos = given or ((PAPERS_RHO,) if fixed else around(f.wbits))
    group = None if f.faithful else _group(f.range_ or "column", least=1)
    return RmsGrid(bits=f.wbits, unbiased=f.unbiased, rhos=rhos), group


def _lattice(f: Flags) -> tuple[Lattice, int | None]:
    """The lattice, and the columns that share a scale."""
    row = LATTICES[f.codebook]
    rho, ratio = CENTRES[f.codebook]
    rhos = tuple(round(rho * share, 4) for share in SHARES)
    if f.faithful:
        rhos, ratio = (SHARP_RHO if row.ratio is None else row.rho,), row.ratio
    if f.scale_override:
        rhos = (f.scale_override,)
    book = Lattice(stages=row.stages, ratio=f.resid_scale_override or ratio, rhos=rhos)
    return book, None if f.faithful else _group(f.range_ or LATTICE_RANGE, least=8)


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
