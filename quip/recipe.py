"""A Recipe says how one matrix is quantized; `METHODS` and `build_recipe` name the papers' rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quip.codebooks import Codebook, MinMaxGrid, RmsGrid, around
from quip.codebooks.grid import FITTED, Grid
from quip.errors import UsageError
from quip.feedback import Feedback, admm, coordinate, ldl, none
from quip.transforms import Draw, Kronecker, Rescale, draw_blocked, draw_blocked_unpermuted

Order = Callable[[Tensor, int, int | None], Tensor]


def natural(H: Float[Tensor, "n n"], dim: int, group: int | None) -> Int[Tensor, " n"]:
    """First column to last: OPTQ."""
    return torch.arange(len(H), device=H.device)


def backwards(H: Float[Tensor, "n n"], dim: int, group: int | None) -> Int[Tensor, " n"]:
    """Last column to first, in blocks of `dim`: QuIP's LDLQ as published.

    Groups are counted from the first column; a short last group stays last.
    """
    columns = natural(H, dim, group).reshape(-1, dim)
    whole = len(columns) - len(columns) % ((group or dim) // dim)
    return torch.cat([columns[:whole].flip(0), columns[whole:].flip(0)]).reshape(-1)


def largest_first(H: Float[Tensor, "n n"], dim: int, group: int | None) -> Int[Tensor, " n"]:
    """By diag(H), largest first; whole groups by their mean, and blocks of `dim` inside them.

    A short last group stays last.
    """
    weight = H.diagonal().reshape(-1, dim).mean(1)  # [n/dim]
    size = (group or len(H)) // dim
    order = [
        torch.argsort(part, descending=True, stable=True) + start * size
        for start, part in enumerate(weight.split(size))
    ]
    means = torch.stack([part.mean() for part in weight.split(size)])
    whole = means if len(weight) % size == 0 else means[:-1]
    ranks = torch.argsort(whole, descending=True, stable=True).tolist()
    blocks = torch.cat([order[g] for g in [*ranks, *range(len(ranks), len(order))]])
    return (blocks[:, None] * dim + torch.arange(dim, device=H.device)).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one matrix is quantized: algorithms, not flags.

    `group` is the number of columns that share one fit of the codebook, refitted to the
    running weights during the sweep (None: one fit for the matrix, before it). `clamp_target`
    moves weights into the codebook's range before any feedback, so that the error of the clip
    is lost to it: the paper's Algorithm 1, line 7.
    """

    codebook: Codebook
    transforms: tuple[Draw, ...] = ()
    order: Order = natural
    feedback: Feedback = ldl
    group: int | None = None
    damp: float = 0.01
    greedy_passes: int = 0
    clamp_target: bool = False


def describe(recipe: Recipe) -> dict[str, object]:
    """The recipe in words and numbers, for a report."""
    return {field.name: _plain(getattr(recipe, field.name)) for field in fields(recipe)}


def _plain(value: object) -> object:
    match value:
        case tuple():
            return [_plain(item) for item in value]
        case partial():
            return {"name": _plain(value.func), **value.keywords}
        case Grid():
            shown = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in FITTED}
            return {"name": type(value).__name__, **{k: _plain(v) for k, v in shown.items()}}
        case torch.dtype():
            return str(value).removeprefix("torch.")
    return getattr(value, "__qualname__", value)


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
ROTATIONS: dict[int, Draw] = {
    0: draw_blocked,
    1: Kronecker.draw,
    2: draw_blocked_unpermuted,
}
PAPERS_RHO = 2.4


def build_recipe(
    *,
    quant: str,
    wbits: int,
    incoh_processing: bool = False,
    pre_rescale: bool = False,
    pre_proj: bool = False,
    pre_proj_extra: int | None = None,
    qfn: str | None = None,
    npasses: int | None = None,
    unbiased: bool = False,
    groupsize: int | None = None,
    percdamp: float = 0.01,
    range_: str | None = None,
    rho: float | None = None,
    faithful: bool = False,
) -> Recipe:
    """The recipe of a command line. Raises UsageError where a combination means nothing."""
    extra = 1 if pre_proj_extra is None else pre_proj_extra
    _refuse_values(quant, wbits, percdamp, extra, qfn, rho)
    method = METHODS[quant]
    rescale, rotate = pre_rescale or incoh_processing, pre_proj or incoh_processing
    if pre_proj_extra is not None and not rotate:
        raise UsageError(
            f"--pre_proj_extra {extra} chooses a rotation: add --pre_proj or --incoh_processing"
        )
    qfn = qfn or ("b" if incoh_processing else "a")
    passes = _passes(quant, npasses, unbiased)
    draws: list[Draw] = [Rescale.draw] if rescale else []
    if rotate:
        draws.append(ROTATIONS[extra])
    recipe = Recipe(
        codebook=MinMaxGrid(bits=wbits, unbiased=unbiased),
        transforms=tuple(draws),
        order=method.order,
        feedback=method.feedback,
        damp=percdamp,
        greedy_passes=passes - method.swept_passes,
    )
    if qfn == "a":
        _refuse_grid_a(incoh_processing, range_, rho, groupsize, faithful)
        return replace(recipe, group=groupsize, clamp_target=faithful)
    _refuse_grid_b(rotate, range_, rho, groupsize, faithful)
    # A range of the least squared error shrinks weights on the whole. Feedback makes up for that;
    # without it perplexity suffers.
    fixed = faithful or method.feedback is none
    rhos = (rho,) if rho else (PAPERS_RHO,) if fixed else around(wbits)
    book = RmsGrid(bits=wbits, unbiased=unbiased, rhos=rhos)
    group = None if faithful else _group(range_ or "column")
    return replace(recipe, codebook=book, group=group, clamp_target=faithful)


def _refuse_values(
    quant: str, wbits: int, percdamp: float, pre_proj_extra: int, qfn: str | None, rho: float | None
) -> None:
    if quant not in METHODS:
        raise UsageError(f"--quant {quant}: not one of {', '.join(METHODS)}")
    if not 2 <= wbits <= 8:
        raise UsageError(f"--wbits {wbits}: 2 to 8 bits can be quantized to (16 evaluates only)")
    if not 0 <= percdamp < math.inf:
        raise UsageError(f"--percdamp {percdamp}: damping is a finite share, 0 or more")
    if pre_proj_extra not in ROTATIONS:
        raise UsageError(f"--pre_proj_extra {pre_proj_extra}: not one of 0, 1, 2")
    if qfn not in (None, "a", "b"):
        raise UsageError(f"--qfn {qfn}: the grids are a and b")
    if rho is not None and not 0 < rho < math.inf:
        raise UsageError(f"--rho {rho}: a range is a positive multiple of the RMS")


def _passes(quant: str, npasses: int | None, unbiased: bool) -> int:
    passes = METHODS[quant].passes if npasses is None else npasses
    if passes < 0:
        raise UsageError(f"--npasses {passes}: it cannot be negative")
    if quant == "allbal" and passes == 0:
        raise UsageError("--quant allbal --npasses 0 would round nothing: say 1 or more")
    if unbiased and passes:
        raise UsageError(
            f"--unbiased with {passes} greedy passes: a pass rounds to nearest and undoes it; "
            "say --npasses 0 with ldlqRG, or leave out --unbiased"
        )
    return passes


def _refuse_grid_a(
    incoh: bool, range_: str | None, rho: float | None, groupsize: int | None, faithful: bool
) -> None:
    if incoh:
        raise UsageError("--incoh_processing means --qfn b: leave out --qfn a")
    for flag, given in (("--range", range_), ("--rho", rho)):
        if given:
            raise UsageError(
                f"{flag} speaks of the incoherent grid (--qfn b): add --incoh_processing"
            )
    if groupsize is not None and groupsize < 1:
        raise UsageError(f"--groupsize {groupsize}: a group has at least one column")
    if groupsize and faithful:
        raise UsageError("--faithful clips to one range before the sweep: leave out --groupsize")


def _refuse_grid_b(
    rotate: bool, range_: str | None, rho: float | None, groupsize: int | None, faithful: bool
) -> None:
    if not rotate:
        raise UsageError(
            "--qfn b needs --pre_proj: one range for the whole matrix serves only weights that "
            "a rotation has made alike; add --pre_proj (or --incoh_processing), or use --qfn a"
        )
    if groupsize is not None:
        raise UsageError(
            f"--groupsize {groupsize} with --qfn b: groups of a row share a range in grid a; "
            "say --range N for the incoherent grid"
        )
    if faithful and (range_ or rho):
        raise UsageError("--faithful fixes --range tensor and --rho 2.4: leave them out")


def _group(range_: str) -> int | None:
    if range_ == "tensor":
        return None
    if range_ == "column":
        return 1
    if range_.isdecimal() and int(range_) > 0:
        return int(range_)
    raise UsageError(f"--range {range_}: say tensor, column or a number of columns")
