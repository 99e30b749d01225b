"""Flags of vector codebooks: the groups that they choose, and what means nothing."""

import subprocess
import sys
import time

import pytest

from quip.codebooks.centroids import Scheme
from quip.errors import UsageError
from quip.matrix.build import build_recipe, check_flags
from quip.matrix.centroids import UpdateCentroids
from quip.matrix.methods import GPTVQ, RECIPES
from quip.matrix.polish import Greedy
from quip.matrix.recipe import Recipe
from quip.transforms import HadamardDraw

VQ = {"codebook": "vq", "wbits": 2}
ONE, TWO, FOUR = ({**VQ, "vq_dim": dim} for dim in (1, 2, 4))
FORWARD = {"quant": "gptq"}

REFUSED = [
    ({**VQ, "vq_dim": 3}, "--vq_dim 3: not one of 1, 2, 4"),
    (
        {**FOUR, "wbits": 8},
        "--wbits 8 --vq_dim 4: codebooks of 2^32 centroids, and 2^16 are the most; say a smaller "
        "--vq_dim",
    ),
    (
        {**FOUR, "columns_per_group": 254},
        "--columns_per_group 254 with --vq_dim 4: a group would cut vectors; say a multiple of 4",
    ),
    (
        {**TWO, "wbits": 3, "groupsize": 64},
        "groups of 64 weights are 32 vectors for 64 centroids: say --groupsize 128 or more (or "
        "fewer bits per value), fewer --wbits or a smaller --vq_dim",
    ),
    (
        {**TWO, "wbits": 8},
        "groups of 65536 weights are 32768 vectors for 65,536 centroids: say --groupsize 131072 ",
    ),
    (
        {**TWO, "bits_per_value": 30.0},
        "groups of 9 weights are 4 vectors for 16 centroids: say --groupsize 32 or more",
    ),
    (
        {**ONE, "groupsize": 64, "columns_per_group": 256},
        "--columns_per_group 256 with groups of 64 weights: they would be less than one row; say "
        "--columns_per_group 64 or fewer",
    ),
    (
        {**TWO, "vq_seed": "cdf"},
        "--vq_seed cdf with --vq_dim 2: quantiles are of single weights; say --vq_dim 1, ",
    ),
    (
        {**FOUR, "svd_rank": 0.5},
        "--svd_rank 0.5 with --vq_dim 4: codebooks of single weights can be sorted, and only those "
        "are near to a low rank; say --vq_dim 1",
    ),
    ({**ONE, "svd_rank": 1.5}, "--svd_rank 1.5: a share above 0, up to 1, is needed"),
    (
        {**ONE, "svd_rank": 0.5, "codebook_bits": 8},
        "--svd_rank 0.5 --codebook_bits 8: its factors have 16 bits; leave out --codebook_bits",
    ),
    (
        {**ONE, **FORWARD, "vq_scaling": 48},
        "--columns_per_group 256 with scales of 48 weights: a group would cut them; say a multiple "
        "of 48, or another --vq_scaling",
    ),
    (
        {**FOUR, **FORWARD, "vq_scaling": 6},
        "--vq_scaling 6 with --vq_dim 4: a scale would cut vectors; say a multiple of 4",
    ),
    (
        {**TWO, "vq_scaling": 64},
        "--vq_scaling 64 with --quant ldlq: scales belong to neighbours, and it takes columns in "
        "another order; say --quant gptq",
    ),
    ({**TWO, "codebook_bits": 4}, "--codebook_bits 4 with --quant ldlq: scales belong to neighbo"),
    (
        {**TWO, **FORWARD, "vq_scaling": 64, "codebook_bits": 4},
        "--vq_scaling 64 --codebook_bits 4: entries of 4 bits have units of 128 weights already; ",
    ),
    (
        {**TWO, "bits_per_value": 2.0},
        "--bits_per_value 2: codes take 2 bits of it, and no group is so large that its codebook "
        "costs nothing; say more than 2, or fewer --wbits",
    ),
    (
        {**TWO, **FORWARD, "bits_per_value": 2.0625, "vq_scaling": 64},
        "--bits_per_value 2.0625: codes take 2 bits and 0.0625 of scales of it, and no group is so "
        "large that its codebook costs nothing; say more than 2.0625, or fewer --wbits",
    ),
    ({**TWO, "bits_per_value": float("nan")}, "--bits_per_value nan: a number of bits up to 32"),
    (
        {**TWO, "groupsize": 2048, "bits_per_value": 2.125},
        "--groupsize and --bits_per_value both choose the group: leave one out",
    ),
    (
        {**TWO, "quant": "ldlbal_admm"},
        "--quant ldlbal_admm --vq_dim 2: it bounds the feedback of single columns; say --vq_dim 1",
    ),
    ({**TWO, "em_iters": -1}, "--em_iters -1: it cannot be negative"),
    ({**TWO, "em_iters": 10**5}, "--em_iters 100000: at most 10,000 make sense"),
    ({**TWO, "vq_scaling": 0}, "--vq_scaling 0: a scale serves at least one weight"),
    ({**TWO, "groupsize": 0}, "--groupsize 0: a group has at least one column"),
    ({**TWO, "codebook_bits": 5}, "--codebook_bits 5: not one of 16, 8, 4"),
    ({**TWO, "unbiased": True}, "--unbiased speaks of integer grids"),
    ({**TWO, "rho": 2.4}, "--rho 2.4 speaks of grid b"),
    ({"wbits": 2, "vq_dim": 2}, "--vq_dim 2 speaks of vq: say --codebook vq, or leave it out"),
    ({"codebook": "vq"}, "--wbits None: 1 to 8 bits can be quantized to"),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_what_means_nothing_is_refused_with_the_reason(flags, reason):
    with pytest.raises(UsageError) as caught:
        build_recipe(**flags)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


def test_a_command_line_that_means_nothing_is_refused_before_torch_is_imported():
    code = (
        "import sys\nfrom quip.cli import main\n"
        "lines = sys.stdin.read().splitlines()\n"
        "assert [main(['run', 'demo', 'pydoc', *line.split()]) for line in lines] == [2] * "
        "len(lines)\nassert 'torch' not in sys.modules\n"
    )
    lines = [
        " ".join(f"--{name} {value}" for name, value in flags.items())
        for flags, _ in REFUSED
        if flags.get("vq_dim") != 3 and "unbiased" not in flags and "wbits" in flags
    ]
    start = time.process_time()
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.process_time() - start < 10
    said = done.stderr.splitlines()
    assert len(said) == len(lines) > 20
    assert all(line.startswith("quip: ") for line in said)


def scheme(**flags) -> Scheme:
    return build_recipe(**flags).codebook.scheme


@pytest.mark.parametrize(
    ("flags", "weights"),
    [  # specification, section 3: trades of equal cost
        ({**TWO, "bits_per_value": 2.125}, 2048),
        ({**TWO, "bits_per_value": 2.125, "codebook_bits": 16}, 4096),
        ({**TWO, "bits_per_value": 2.125, "codebook_bits": 4, "quant": "gptq"}, None),
        ({**TWO, "bits_per_value": 2.25, "codebook_bits": 4, "quant": "gptq"}, 1024),
        ({**TWO, "bits_per_value": 2.125, "vq_scaling": 64, "quant": "gptq"}, 4096),
        ({**ONE, "bits_per_value": 2.125}, 256),
        ({**ONE, "bits_per_value": 2.125, "svd_rank": 0.5}, 256),
        ({**ONE, "bits_per_value": 2.125, "svd_rank": 1.0}, 512),
        ({**TWO, "groupsize": 1234}, 1234),
        ({**TWO, "faithful": True}, 2048),
        ({**ONE, "faithful": True, "wbits": 3}, 512),
        ({**FOUR, "faithful": True}, 65536),
    ],
    ids=str,
)
def test_the_group_comes_to_the_bits_that_are_asked_for(flags, weights):
    if weights is None:
        with pytest.raises(UsageError, match=r"2 bits and 0\.125 of scales"):
            build_recipe(**flags)
    else:
        assert scheme(**flags).weights == weights


@pytest.mark.parametrize(
    ("flags", "columns"),
    [
        ({**ONE, "groupsize": 128}, 128),
        ({**ONE, "groupsize": 64}, 64),
        ({**FOUR, "wbits": 1, "groupsize": 102}, 100),
        ({**TWO, "groupsize": 256}, 256),
        ({**TWO, "groupsize": 2048}, 256),
        ({**TWO, "groupsize": 2048, "columns_per_group": 128}, 128),
        ({**TWO, **FORWARD, "groupsize": 100, "vq_scaling": 16}, 96),
    ],
    ids=str,
)
def test_a_group_has_256_columns_or_those_of_one_row(flags, columns):
    recipe = build_recipe(**flags)
    assert recipe.group == recipe.codebook.scheme.columns == columns


def test_the_papers_recipes_are_of_the_bits_in_their_names():
    assert len(GPTVQ) == len(set(GPTVQ)) == 10
    for dim, bits in GPTVQ:
        flags = RECIPES[f"gptvq-{dim}d-{bits}"].flags
        own = scheme(**flags)
        assert (own.dim, own.bits, own.entry_bits) == (dim, int(bits), 8)
        assert own.k * dim * 8 / own.weights == bits - int(bits)


def test_faithful_is_the_papers_algorithm():
    paper, ours = (build_recipe(**{**TWO, **FORWARD, "faithful": on}) for on in (True, False))
    assert paper.transforms == ()
    assert ours.transforms == (HadamardDraw(block=None),)
    assert not paper.stack
    assert paper.polish == (UpdateCentroids(30),)
    assert check_flags(**TWO, faithful=True).passes == 0
    assert build_recipe(**TWO, faithful=True, codebook_update="none").polish == ()
    both = build_recipe(**TWO, npasses=2).polish
    assert both == (UpdateCentroids(30), *2 * (Greedy(1), UpdateCentroids(30)))
    assert build_recipe(**TWO, npasses=2, codebook_update="none").polish == (Greedy(2),)


@pytest.mark.parametrize(
    ("flags", "m", "n", "reason"),
    [
        (FOUR, 64, 66, "its 66 inputs are no multiple of 4, and the codebook rounds so many"),
        (
            {**FOUR, "wbits": 3},
            64,
            192,
            "its 64 x 192 weights make groups of 3,072 vectors for 4,096 centroids; say fewer "
            "--wbits or a smaller --vq_dim, or keep the matrix out of it by --plan",
        ),
        (
            {**FOUR, "wbits": 3},
            64,
            512,
            "its 64 x 512 weights make groups of 4,096 vectors for 4,096 centroids",
        ),
        (
            {**TWO, "wbits": 4, "columns_per_group": 16, "groupsize": 512, "rotation": "none"},
            31,
            160,
            "its 31 x 160 weights make groups of 248 vectors for 256 centroids; say a larger "
            "--columns_per_group, fewer",
        ),
        (
            {**TWO, "wbits": 4, "columns_per_group": 16, "groupsize": 512, "rotation": "none"},
            63,
            160,
            "its 63 x 160 weights make groups of 248 vectors for 256 centroids; say a larger "
            "--groupsize, fewer",
        ),
    ],
    ids=str,
)
def test_a_matrix_that_no_group_fits_is_refused_by_name(flags, m, n, reason):
    recipe: Recipe = build_recipe(**flags)
    if "4,096 vectors" in reason:
        recipe.check(m, n, "blocks.3.q")  # as many as there are centroids
        return
    assert not recipe.can_do(m, n)
    with pytest.raises(UsageError) as caught:
        recipe.check(m, n, "blocks.3.q")
    assert str(caught.value).startswith(f"blocks.3.q: {reason}")
