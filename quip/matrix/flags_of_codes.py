"""Flags that say how weights are rounded, and to what. No torch."""

import math
from dataclasses import dataclass
from functools import partial

from quip.codebooks.names import CODEBOOKS, INTEGERS, MOST_STATES, TRELLIS_CODES
from quip.matrix.methods import METHODS
from quip.matrix.said import MOST_PASSES, bad_passes, bad_scale, bad_tile, flag, listed, number

of_method = partial(flag, "method")
of_codebook = partial(flag, "codebook")
of_vectors = partial(flag, "vector codebooks (vq)")
TRELLIS = "trellis codes (trellis)"
of_trellis = partial(flag, TRELLIS)


@dataclass(frozen=True, kw_only=True)
class FlagsOfCodes:
    """How weights are rounded, and to what; the names are those of the flags."""

    wbits: int | float | None = of_method(
        "bits per weight; 16, the default, evaluates the model as it is (a lattice has its own: "
        "leave it out; halves are for trellis)",
        kind=number,
        choices=(*sorted({bits for row in CODEBOOKS.values() for bits in row.bits}), 16),
    )
    quant: str = of_method(
        f"how weights are rounded (default ldlq): {listed(METHODS)}",
        default="ldlq",
        choices=METHODS,
    )
    npasses: int | None = of_method(
        "greedy passes over the columns: by default 10 for ldlqRG and allbal, else 2 for lattices "
        "after feedback (10 with --faithful), 2 for vq (0 with --faithful), 1 for trellis after "
        "feedback and 0 for grids",
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
    sym: bool = of_method(
        "grid a symmetric about 0, as the formats of other engines have it: levels -2^(b-1) to "
        "2^(b-1) - 1 times a step, which is searched for each range; no zero is stored",
        kind=bool,
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
        "its own --wbits; lattices, vq and trellis bring --rotation hadamard, one or two greedy "
        "passes after feedback (--npasses) and stacks of q, k and v (--no_fuse)",
        default=INTEGERS,
        choices=CODEBOOKS,
    )
    scale: str | None = of_codebook(
        "auto: quantize each matrix with several scales of the lattice or trellis, and keep the "
        "one with the smallest proxy loss",
        choices=("auto",),
    )
    scale_override: float | None = of_codebook(
        "the RMS that weights have when they meet the lattice (default: of six values around the "
        "Gaussian optimum, the one with the smallest squared error at each fit; with --faithful "
        "the published one), or the trellis, whose Gaussian optimum, the default, is 1",
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
        "quantize q, k and v, and up and gate, one by one instead of stacked (lattices, vq "
        "and trellis)",
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
    trellis_code: str | None = of_trellis(
        "what the states of the trellis stand for: learned, the default, a table drawn once for "
        "every --wbits and --trellis_states; mcg, mul1, 1mad, 3inst or int8, numbers computed "
        "from the state; hyb, pairs from a table of 512",
        choices=TRELLIS_CODES,
    )
    trellis_states: int | None = of_trellis(
        "bits of a state: 2^N of them, and the time of rounding goes with their number (default 12 "
        "for learned, which has 8, 10 and 12; 16 for others)",
        kind=int,
        metavar="N",
        refuse=lambda n: not 1 <= n <= MOST_STATES and f"a state has 1 to {MOST_STATES} bits",
    )
    tile: str | None = of_trellis(
        "rows x columns of the weights that are rounded together, rows being near to that number "
        "(default 256x1, which leaves feedback whole; 128x2 where a step is of two weights: at "
        "halves of bits, and for hyb)",
        metavar="AxB",
        refuse=bad_tile,
    )
    own_table: bool = of_trellis(
        "give each matrix its own copy of the table, 2^N numbers of 16 bits for N bits of a state "
        "(twice as many at halves of bits), which fine-tuning then moves",
        kind=bool,
    )
