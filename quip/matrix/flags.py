"""What may be said of a recipe on a command line: every flag once, with its help. No torch.

The command line, `build_recipe`, the descriptions of tables and the documents read this table.
Which flags a part of a recipe reads is said by the part (quip.matrix.books, quip.matrix.build).
"""

import math
from dataclasses import Field, dataclass, fields
from functools import partial
from typing import Any

from quip.codebooks.names import CODEBOOKS, INTEGERS
from quip.errors import UsageError, short, shown
from quip.matrix.methods import EXTRAS, METHODS, ROTATIONS, UNROTATED
from quip.matrix.said import (
    MOST,
    MOST_PASSES,
    bad_passes,
    bad_rho,
    bad_scale,
    flag,
    listed,
    number_or_auto,
)

of_method = partial(flag, "method")
of_codebook = partial(flag, "codebook")
of_vectors = partial(flag, "vector codebooks (vq)")
of_processing = partial(flag, "incoherence processing")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What may be said of a recipe on a command line; the names are those of the flags."""

    wbits: int | float | None = of_method(
        "bits per weight; 16, the default, evaluates the model as it is (a lattice has its own: "
        "leave it out)",
        kind=int,
        choices=(*range(1, 9), 16),
    )
    quant: str = of_method(
        f"how weights are rounded (default ldlq): {listed(METHODS)}",
        default="ldlq",
        choices=METHODS,
    )
    npasses: int | None = of_method(
        "greedy passes over the columns: by default 10 for ldlqRG and allbal, else 2 for lattices "
        "after feedback (10 with --faithful), 2 for vq (0 with --faithful) and 0 for grids",
        kind=int,
        metavar="N",
        refuse=bad_passes,
    )
    unbiased: bool = of_method("round at random, so that the mean is exact", kind=bool)
    groupsize: int | None = of_method(
        "columns of a row that share one range in grid a (by default the whole row); weights that "
        "share one codebook of vq (by default 65,536)",
        kind=int,
        metavar="N",
        refuse=lambda n: n < 1 and "a group has at least one column",
    )
    percdamp: float = of_method(
        "what is added to the diagonal of H, as a share of its mean (default 0.01); ten times more "
        "after each failed factorisation, three times at most",
        default=0.01,
        kind=float,
        metavar="X",
        refuse=lambda x: not 0 <= x < math.inf and "damping is a finite share, 0 or more",
    )
    lazy_batch: bool = of_method(
        "accepted and ignored: updates are always blocked, with the same codes", kind=bool
    )
    codebook: str = of_codebook(
        f"what weights are rounded to (default {INTEGERS}): {listed(CODEBOOKS)}. A lattice brings "
        "its own --wbits; lattices and vq bring --rotation hadamard, two greedy passes after "
        "feedback (--npasses) and stacks of q, k and v (--no_fuse)",
        default=INTEGERS,
        choices=CODEBOOKS,
    )
    scale: str | None = of_codebook(
        "auto: quantize each matrix with several scales of the lattice, and keep the one with the "
        "smallest proxy loss",
        choices=("auto",),
    )
    scale_override: float | None = of_codebook(
        "the RMS that weights have when they meet the lattice (default: of six values around the "
        "Gaussian optimum, the one with the smallest squared error at each fit; with --faithful "
        "the published one)",
        kind=float,
        metavar="X",
        refuse=bad_scale,
    )
    resid_scale_override: float | None = of_codebook(
        "by how much the second stage of a lattice magnifies what the first one left (default: 2.1 "
        "at 3 bits, 3.8 at 4; with --faithful the published 2.04 and 3.45)",
        kind=float,
        metavar="X",
        refuse=bad_scale,
    )
    no_fuse: bool = of_codebook(
        "quantize q, k and v, and up and gate, one by one instead of stacked (lattices and vq)",
        kind=bool,
    )
    vq_dim: int | None = of_vectors(
        "neighbours of a row that are rounded together to one centroid (default 4 up to 2 bits, 2 "
        "up to 4, else 1)",
        kind=int,
        choices=(1, 2, 4),
    )
    columns_per_group: int | None = of_vectors(
        "columns of a group of weights that share a codebook (default 256, or all of a group of "
        "fewer weights; groups of a matrix are made even)",
        kind=int,
        metavar="N",
        refuse=lambda n: n < 1 and "a group has at least one column",
    )
    bits_per_value: float | None = of_vectors(
        "choose the --groupsize with which codes, codebooks and scales come to X bits per weight, "
        "not counting the scale of 16 bits of each codebook, as in the paper",
        kind=float,
        metavar="X",
        refuse=lambda x: not 0 < x <= 32 and "a number of bits up to 32 is needed",
    )
    em_iters: int | None = of_vectors(
        "iterations of EM for each codebook (default 100)",
        kind=int,
        metavar="N",
        refuse=lambda n: (
            (n < 0 and "it cannot be negative")
            or (n > MOST_PASSES and f"at most {MOST_PASSES:,} make sense: it settles in hundreds")
        ),
    )
    vq_seed: str | None = of_vectors(
        "where EM starts: cdf, quantiles (for --vq_dim 1 alone, whose default it is); kpp, "
        "k-means++ (the default of others); mahalanobis, vectors at even ranks of their distance "
        "to the mean (the default with --faithful)",
        choices=("mahalanobis", "kpp", "cdf"),
    )
    vq_weights: str | None = of_vectors(
        "what errors weigh in EM and rounding: loss, the default, what they cost in the sweep; "
        "none, all alike",
        choices=("loss", "none"),
    )
    vq_scaling: int | None = of_vectors(
        "divide every N weights of a row by a scale of 4 bits before they meet their codebook",
        kind=int,
        metavar="N",
        refuse=lambda n: n < 1 and "a scale serves at least one weight",
    )
    codebook_update: str | None = of_vectors(
        "after the sweep, and after each of --npasses: cg, the default, moves centroids to where "
        "the loss is least, codes fixed, by conjugate gradients; none leaves them",
        choices=("cg", "none"),
    )
    codebook_bits: int | None = of_vectors(
        "bits of the entries of codebooks (default 8); 4: whole numbers in units of 128 weights",
        kind=int,
        choices=(16, 8, 4),
    )
    codebook_scale: str | None = of_vectors(
        "what shares a scale of the entries of codebooks: each codebook its own (the default), or "
        "all of the same columns one",
        choices=("codebook", "columns"),
    )
    svd_rank: float | None = of_vectors(
        "store the codebooks of --vq_dim 1 as a product of factors whose rank is a share X of "
        "their size",
        kind=float,
        metavar="X",
        refuse=lambda x: not 0 < x <= 1 and "a share above 0, up to 1, is needed",
    )
    incoh_processing: bool = of_processing(
        "QuIP's processing: short for --pre_gptqH --pre_rescale --pre_proj --qfn b", kind=bool
    )
    pre_gptqH: bool = of_processing(
        "accepted and ignored: H is always damped by --percdamp (0 turns it off)", kind=bool
    )
    pre_rescale: bool = of_processing(
        "rescale the inputs, to balance W against H (--incoh_processing does)", kind=bool
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
        "(QuIP#: random signs and a Hadamard matrix; the default for lattices and vq), or none in "
        "place of that default",
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
        "what the range of grid b or the scale of a lattice is fitted to: the whole matrix once "
        "(the default with --faithful), or the running weights of each column (the default; a "
        "lattice: of 8) or of every N columns as the rounding reaches them",
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
