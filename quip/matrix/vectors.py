"""What learned vector codebooks (GPTVQ) read of the flags. No torch: refusals come at once."""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from quip.codebooks.names import Choice
from quip.errors import UsageError
from quip.matrix.takes import Take

if TYPE_CHECKING:
    from quip.codebooks import Learned

COLUMNS = 256  # of a group, so that it is fitted to weights which carry the feedback before it
WEIGHTS = 256 * COLUMNS  # of a group of rotated weights, which are alike everywhere
OVERHEAD = 0.125  # bits per weight, of the paper's groups
ENTRY = 8
UNIT = 128  # weights that share the unit of entries of 4 bits
SCALE = 4  # bits of the scale of a run
STEPS = 30  # of conjugate gradients
PASSES = 2


def learned(take: Take) -> Choice:
    """Learned centroids of --vq_dim neighbours."""
    bits, faithful, update = take("wbits"), take("faithful"), take("codebook_update")
    dim = take("vq_dim") or (4 if bits <= 2 else 2 if bits <= 4 else 1)
    if bits * dim > 16:
        raise UsageError(
            f"--wbits {bits} --vq_dim {dim}: codebooks of 2^{bits * dim} centroids, and 2^16 are "
            "the most; say a smaller --vq_dim"
        )
    if dim > 1 and take("quant") == "ldlbal_admm":
        raise UsageError(
            f"--quant ldlbal_admm --vq_dim {dim}: it bounds the feedback of single columns; say "
            "--vq_dim 1, or ldlq"
        )
    entry_bits, rank = _entries(take, bits, dim)
    run = _run(take, dim, entry_bits)
    weights = _weights(take, dim * (rank or 2 ** (bits * dim)) * entry_bits, run, faithful)
    columns = take("columns_per_group") or _columns(weights, run or dim)
    _check_groups(weights, columns, bits, dim, run)
    seeds = take("vq_seed") or ("mahalanobis" if faithful else "cdf" if dim == 1 else "kpp")
    if seeds == "cdf" and dim > 1:
        raise UsageError(
            f"--vq_seed cdf with --vq_dim {dim}: quantiles are of single weights; say --vq_dim 1, "
            "mahalanobis or kpp"
        )
    scheme = {
        "dim": dim,
        "bits": bits,
        "weights": weights,
        "columns": columns,
        "entry_bits": entry_bits,
        "shared": take("codebook_scale") == "columns",
        "rank": rank,
        "run": run,
    }
    iterations = take("em_iters")
    return Choice(
        codebook=partial(
            _learned,
            scheme=scheme,
            iterations=100 if iterations is None else iterations,
            seeds=seeds,
            weighted=take("vq_weights") != "none",
        ),
        group=columns,
        stack=not take("no_fuse") and not faithful,
        rotation=None if faithful else "hadamard",
        passes=0 if faithful else PASSES,
        update=0 if update == "none" else STEPS,
    )


def _entries(take: Take, bits: int, dim: int) -> tuple[int, int | None]:
    """Bits of a codebook's entries, and its rank (None: full)."""
    said, share = take("codebook_bits"), take("svd_rank")
    if take("codebook_scale") and (said in (16, 4) or share):
        what = f"--codebook_bits {said}" if said else f"--svd_rank {share:g}"
        raise UsageError(
            f"--codebook_scale {take('codebook_scale')} with {what}: only entries of 8 bits leave "
            "a choice of their scale; leave it out"
        )
    if said == 4 and bits > 4:
        raise UsageError(
            f"--codebook_bits 4 --wbits {bits}: entries of 4 bits say no more than 4 bits a weight"
        )
    if share is None:
        return said or ENTRY, None
    if dim > 1:
        raise UsageError(
            f"--svd_rank {share:g} with --vq_dim {dim}: codebooks of single weights can be sorted, "
            "and only those are near to a low rank; say --vq_dim 1"
        )
    if said not in (None, 16):
        raise UsageError(
            f"--svd_rank {share:g} --codebook_bits {said}: its factors have 16 bits; leave out "
            "--codebook_bits"
        )
    return 16, max(1, math.ceil(2**bits * share))


def _run(take: Take, dim: int, entry_bits: int) -> int | None:
    """The weights of a row that share a scale."""
    run = take("vq_scaling")
    if entry_bits == 4:
        if run is not None:
            raise UsageError(
                f"--vq_scaling {run} --codebook_bits 4: entries of 4 bits have units of {UNIT} "
                "weights already; leave one out"
            )
        run = UNIT
    if run is None:
        return None
    if run % dim:
        raise UsageError(
            f"--vq_scaling {run} with --vq_dim {dim}: a scale would cut vectors; say a multiple of "
            f"{dim}"
        )
    if take("quant") not in ("nearest", "gptq"):
        raise UsageError(
            f"{f'--vq_scaling {run}' if entry_bits != 4 else '--codebook_bits 4'} with --quant "
            f"{take('quant')}: scales belong to neighbours, and it takes columns in another order; "
            "say --quant gptq"
        )
    return run


def _weights(take: Take, entries: int, run: int | None, faithful: bool) -> int:
    """The weights of a group: those said, or as many as come to --bits_per_value.

    `entries` are the bits of its codebook.
    """
    bits, said, wanted = take("wbits"), take("groupsize"), take("bits_per_value")
    if said is not None and wanted is not None:
        raise UsageError("--groupsize and --bits_per_value both choose the group: leave one out")
    if said is not None:
        return int(said)
    if wanted is None and not faithful:
        return WEIGHTS
    scales = 0.0 if run is None else (16 if take("codebook_bits") == 4 else SCALE) / run
    left = OVERHEAD if wanted is None else wanted - bits - scales
    if left <= 0 or entries / left > 10**12:
        fixed = f"{bits} bits" + (f" and {scales:g} of scales" if run else "")
        raise UsageError(
            f"--bits_per_value {wanted:g}: codes take {fixed} of it, and no group is so large that "
            f"its codebook costs nothing; say more than {bits + scales:g}, or fewer --wbits"
        )
    return max(1, round(entries / left))


def _columns(weights: int, unit: int) -> int:
    """The columns of a group: 256, or those of a row of fewer weights, and whole units."""
    return min(COLUMNS, max(unit, weights // unit * unit))


def _check_groups(weights: int, columns: int, bits: int, dim: int, run: int | None) -> None:
    if columns % dim:
        raise UsageError(
            f"--columns_per_group {columns} with --vq_dim {dim}: a group would cut vectors; say a "
            f"multiple of {dim}"
        )
    if run is not None and columns % run:
        raise UsageError(
            f"--columns_per_group {columns} with scales of {run} weights: a group would cut them; "
            f"say a multiple of {run}, or another --vq_scaling"
        )
    if columns > weights:
        raise UsageError(
            f"--columns_per_group {columns} with groups of {weights} weights: they would be less "
            f"than one row; say --columns_per_group {weights // dim * dim or dim} or fewer"
        )
    if weights // dim < 2 ** (bits * dim):
        raise UsageError(
            f"groups of {weights} weights are {weights // dim} vectors for {2 ** (bits * dim):,} "
            f"centroids: say --groupsize {dim * 2 ** (bits * dim)} or more (or fewer bits per "
            "value), fewer --wbits or a smaller --vq_dim"
        )


def _learned(*, scheme: dict[str, Any], **options: Any) -> "Learned":
    from quip.codebooks import Learned
    from quip.codebooks.centroids import Scheme

    return Learned(scheme=Scheme(**scheme), **options)
