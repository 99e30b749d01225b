"""What the codebooks of the papers read of the flags. No torch, so that refusals come at once.

Other codebooks have their `of(take)` in their own file.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from quip.codebooks.names import LATTICES, Choice
from quip.errors import UsageError
from quip.matrix.methods import METHODS
from quip.matrix.takes import Take, columns_of
from quip.matrix.trellis import trellis
from quip.matrix.vectors import learned

if TYPE_CHECKING:
    from quip.codebooks import Lattice, MinMaxGrid, RmsGrid, SymmetricGrid

PAPERS_RHO = 2.4  # of grid b
RHO_SHARES = (0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6)
# Of the step of GPTQ, for --sym. Proxy losses of the demo fall by 12 % at 4 bits and groups of 128,
# by 21 % at 3 and 35 % at 2 bits; with more shares, or denser ones, hardly further.
SHARES_OF_MAX = tuple(i / 20 for i in range(10, 23))
SHARP_RHO = 0.9  # of E8P, as the paper of QuIP# has it
SHARP_PASSES = 10  # of the published code of QuIP#
LATTICE_PASSES = 2  # nine tenths of what any number of passes gains
LATTICE_RANGE = "8"
# (rho, ratio) around which a fit looks, best for proxy losses of rotated weights; and how far.
CENTRES = {"E8P12": (1.0, None), "E8P12RVQ3B": (0.98, 2.1), "E8P12RVQ4B": (0.9, 3.8)}
SHARES = (0.8, 0.87, 0.93, 1.0, 1.07, 1.15)


def grid(take: Take) -> Choice:
    """Grid a or b."""
    take = take.part("integer grids")
    incoherent, qfn = take("incoh_processing"), take("qfn")
    if incoherent and qfn == "a":
        raise UsageError("--incoh_processing means --qfn b: leave out --qfn a")
    if qfn == "b" or incoherent:
        return _grid_b(take.part("grid b"), bits=take("wbits"), unbiased=take("unbiased"))
    return _grid_a(take.part("grid a"), bits=take("wbits"), unbiased=take("unbiased"))


def _grid_a(take: Take, *, bits: int, unbiased: bool) -> Choice:
    group, faithful = take("groupsize"), take("faithful")
    if group and faithful:
        raise UsageError("--faithful clips to one range before the sweep: leave out --groupsize")
    made = partial(_symmetric if take("sym") else _min_max, bits=bits, unbiased=unbiased)
    return Choice(codebook=made, group=group, clamp_target=faithful)


def _grid_b(take: Take, *, bits: int, unbiased: bool) -> Choice:
    """Grid b. `--rho auto` tries ranges from 0.9 to 1.6 times (bits + 1) / 2, which is nearly the
    best for Gaussian weights, and feedback spreads them; and first the best of ten at each fit, the
    default with feedback, so that no matrix then loses more than by default.
    """
    if not (take("pre_proj") or take("incoh_processing")):
        raise UsageError(
            "--qfn b needs --pre_proj: one range for the whole matrix serves only weights that "
            "a rotation has made alike; add --pre_proj (or --incoh_processing), or use --qfn a"
        )
    faithful, range_, rho = take("faithful"), take("range_"), take("rho")
    if faithful and (range_ or rho):
        raise UsageError("--faithful fixes --range tensor and --rho 2.4: leave them out")
    # A range of the least squared error shrinks weights on the whole. Feedback makes up for that;
    # without it perplexity suffers.
    fixed = faithful or (METHODS[take("quant")].feedback == "none" and rho is None)
    given = () if rho in (None, "auto") else (float(rho),)
    rhos = given or ((PAPERS_RHO,) if fixed else ())
    tried = (round(share * (bits + 1) / 2, 4) for share in RHO_SHARES if rho == "auto")
    return Choice(
        codebook=partial(_rms, bits=bits, unbiased=unbiased, rhos=rhos),
        trials=({}, *({"rhos": (one,)} for one in tried)) if rho == "auto" else (),
        group=None if faithful else columns_of(range_ or "column", least=1),
        clamp_target=faithful,
    )


def lattice(take: Take) -> Choice:
    """A lattice, with one scale for the columns that --range says."""
    name, faithful, range_ = take("codebook"), take("faithful"), take("range_")
    scale, override, row = take("scale"), take("scale_override"), LATTICES[name]
    if METHODS[take("quant")].feedback == "admm":
        raise UsageError("--quant ldlbal_admm bounds the feedback of single columns: use ldlq")
    if faithful and range_:
        raise UsageError("--faithful fixes --range tensor: leave it out")
    if scale == "auto" and (override or faithful):
        raise UsageError("--scale auto tries several scales: leave out what fixes one")
    rho, ratio = CENTRES[name]
    rhos = tuple(round(rho * share, 4) for share in SHARES)
    if faithful:
        rhos, ratio = (SHARP_RHO if row.ratio is None else row.rho,), row.ratio
    if override:
        rhos = (override,)
    if row.ratio is not None:
        ratio = take("resid_scale_override") or ratio
    return Choice(
        codebook=partial(_lattice, stages=row.stages, ratio=ratio, rhos=rhos),
        trials=tuple({"rhos": (one,)} for one in rhos) if scale == "auto" else (),
        group=None if faithful else columns_of(range_ or LATTICE_RANGE, least=8),
        stack=not take("no_fuse"),
        rotation="hadamard",
        passes=SHARP_PASSES if faithful else LATTICE_PASSES,
    )


# By home.
READERS: dict[str, Callable[[Take], Choice]] = {
    "grid": grid,
    "lattice": lattice,
    "learned": learned,
    "trellis": trellis,
}


def _min_max(**options: Any) -> "MinMaxGrid":
    from quip.codebooks import MinMaxGrid

    return MinMaxGrid(**options)


def _symmetric(**options: Any) -> "SymmetricGrid":
    from quip.codebooks import SymmetricGrid

    return SymmetricGrid(shares=SHARES_OF_MAX, **options)


def _rms(*, bits: int, unbiased: bool, rhos: tuple[float, ...]) -> "RmsGrid":
    """Without rhos: of ten the best at each fit."""
    from quip.codebooks import RmsGrid, candidate_rhos

    return RmsGrid(bits=bits, unbiased=unbiased, rhos=rhos or candidate_rhos(bits))


def _lattice(**options: Any) -> "Lattice":
    from quip.codebooks import Lattice

    return Lattice(**options)
