"""Learned codebooks: the bits of the paper, what is stored, groups, seeds, scales, odd weights."""

from dataclasses import replace

import pytest
import torch

from quip.codebooks import Centroids, Groups, Learned
from quip.codebooks.centroids import Scheme
from quip.codebooks.grouping import Grouping
from quip.codebooks.scaling import LogScales, UnitScales
from quip.codebooks.seeds import SEEDS, cdf, kpp, mahalanobis
from quip.kernels.bits import unpack
from quip.matrix.build import build_recipe
from quip.matrix.feedback import ldl
from quip.matrix.quantize import quantize_matrix
from quip.matrix.seeds import rng_for
from quip.matrix.sweep import sweep
from quip.packed.matrix import QuantizedMatrix
from tests.laws import assert_near, check_stored, decoded

M, N = 256, 512  # two groups of 256 columns, four of 128
PLAIN = {"codebook": "vq", "quant": "gptq", "faithful": True, "codebook_update": "none"}
# What can be stored, each with its bits beside those of codes and entries: of a matrix.
KINDS = {
    "8 bits": {"dim": 2, "bits": 2},
    "8 bits, one scale": {"dim": 2, "bits": 2, "shared": True},
    "16 bits": {"dim": 4, "bits": 1, "entry_bits": 16},
    "4 bits": {"dim": 2, "bits": 2, "entry_bits": 4, "run": 8},
    "scaled": {"dim": 2, "bits": 2, "run": 8},
    "low rank": {"dim": 1, "bits": 3, "entry_bits": 16, "rank": 3},
}


def gaussian(m: int, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scheme(*, weights: int | None = None, columns: int | None = None, **kind) -> Scheme:
    return Scheme(weights=weights, columns=columns, **kind)


def quantized(W: torch.Tensor, *, seed: int = 0, **flags) -> QuantizedMatrix:
    recipe = build_recipe(**{**PLAIN, "em_iters": 2, **flags})
    recipe.check(*W.shape)
    n = W.shape[1]
    H = torch.eye(n).double() + 0.5 / n
    return quantize_matrix(W, H, recipe, rng=rng_for(seed, "w"))


@pytest.mark.parametrize(
    ("dim", "bits", "of_codebooks", "weights"),
    [  # specification, section 3
        *((1, bits, 0.125, weights) for bits, weights in ((2, 256), (3, 512), (4, 1024))),
        *((2, bits, 0.125, weights) for bits, weights in ((2, 2048), (3, 8192), (4, 32768))),
        *((1, 2, 0.25, 128), (2, 2, 0.25, 1024), (4, 2, 0.125, 65536), (4, 2, 0.25, 32768)),
    ],
)
def test_the_bits_of_the_papers_table_are_those_stored(dim, bits, of_codebooks, weights):
    W = gaussian(M, N)
    flags = {"vq_dim": dim, "wbits": bits, "em_iters": 0}
    q = quantized(W, **flags, bits_per_value=bits + of_codebooks)
    assert q.decoder.scheme.weights == weights
    assert 2 ** (bits * dim) * dim * 8 / weights == of_codebooks
    scale = 16 / weights  # of each codebook, which the paper does not count
    assert q.bits_per_weight == bits + of_codebooks + scale
    shared = quantized(W, **flags, groupsize=weights, codebook_scale="columns")
    columns = 128 if weights == 128 else 256
    assert shared.bits_per_weight == bits + of_codebooks + 16 / (M * columns)


@pytest.mark.parametrize(
    ("flags", "bits"),
    [
        # Twice the group pays for entries of 16 bits, with a scale for each group of columns.
        ({"codebook_bits": 16, "groupsize": 4096}, 2.125 + 16 / (M * 256)),
        # A scale of 4 bits for each run, and an offset and a step in float32 for all rows of it.
        ({"vq_scaling": 64, "groupsize": 4096}, 2.125 + 16 / 4096 + 64 / (M * 64)),
        ({"vq_scaling": 16, "groupsize": 2048}, 2.375 + 16 / 2048 + 64 / (M * 16)),
        # Entries of 4 bits without scales, and a unit in bfloat16 of every 128 weights.
        ({"codebook_bits": 4, "groupsize": 1024}, 2.25),
        # Half the rank: float16 factors of the codebooks of a group of columns.
        (
            {"svd_rank": 0.5, "vq_dim": 1, "groupsize": 256},
            2 + 2 * 16 / 256 + 16 * (2 * 4 + 1) / (M * 256),
        ),
    ],
    ids=str,
)
def test_every_overhead_is_counted(flags, bits):
    q = quantized(gaussian(M, N), **{"wbits": 2, "vq_dim": 2, **flags})
    assert q.bits_per_weight == bits
    stored = sum(x.nbytes for x in q.tensors().values())
    assert 8 * stored == bits * M * N


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, 100])
def test_what_is_stored_is_what_was_used(kind, weights):
    plain = Learned(scheme=scheme(columns=16, weights=weights, **KINDS[kind]), iterations=3)
    book, band = plain.sized(14, 40, 16)
    X, h, d = gaussian(14, 40), torch.linspace(0.5, 2, 40), book.dim
    books = [book.fit(x, w) for x, w in zip(X.split(band, 1), h.split(band), strict=True)]
    books = [b.with_centroids(1.01 * b.centroids, torch.ones(b.centroids.shape[:2])) for b in books]
    codes = []
    for lo in range(0, 40, d):
        served = books[lo // band].at(lo % band)
        codes.append(served.round(X[:, lo : lo + d], h[lo : lo + d]))
    decoder = book.joined(books, Groups(40 // d, band // d))
    again = check_stored(decoder, 14, 40)
    assert isinstance(again, Centroids)
    W_hat = decoded(torch.stack(codes, 1), books, band)
    assert torch.equal(again.decode(torch.stack(codes, 1)), W_hat)
    assert torch.equal(decoder.decode(torch.stack(codes, 1)), W_hat)


def test_codebooks_are_kept_tile_by_tile():
    book = Learned(scheme=scheme(**KINDS["8 bits"]), iterations=2, tile_count=3)
    one, other = (book.fit(gaussian(9, 32, seed=seed), torch.ones(32)) for seed in (0, 1))
    chosen = torch.tensor([True, False, True])
    both = one.where(chosen, other)
    assert torch.equal(both.centroids[chosen], one.centroids[chosen])
    assert torch.equal(both.centroids[~chosen], other.centroids[~chosen])
    loaded = book.scheme.entries.load(both.stored, torch.float32)
    assert torch.equal(loaded, both.centroids)


@pytest.mark.parametrize(
    ("n", "columns", "unit", "band", "bands"),
    [
        (576, 256, 1, 288, 2),  # not 256, 256 and 64
        (576, 256, 128, 384, 2),  # runs of 128 are not cut
        (576, None, 4, 576, 1),
        (192, 256, 2, 192, 1),
        (1536, 256, 4, 256, 6),
        (40, 16, 4, 20, 2),
        (44, 16, 4, 16, 3),
        (12, 1, 4, 4, 3),
        (64, 10**12, 4, 64, 1),
    ],
)
def test_groups_of_columns_are_as_even_as_can_be(n, columns, unit, band, bands):
    grouping = Grouping(10**4, columns, unit)
    assert (grouping.band(n), grouping.bands(n)) == (band, bands)


@pytest.mark.parametrize(
    ("m", "weights", "tiles", "fewest"),
    [
        (576, 2048, 82, 7 * 288),  # rows of 7.1 on average: of 7 and 8
        (576, 65536, 3, 192 * 288),
        (576, 10**12, 1, 576 * 288),  # more than there are: one group over all rows
        (5, 65536, 1, 5 * 288),
        (5, 1, 5, 288),
        (5, None, 1, 5 * 288),
    ],
)
def test_groups_of_rows_are_as_even_as_can_be(m, weights, tiles, fewest):
    grouping = Grouping(weights, 256, 2)
    assert grouping.tiles(m, 576) == tiles
    assert grouping.fewest(m, 576) == fewest


def test_a_matrix_of_odd_sizes_has_the_groups_that_its_file_says():
    q = quantized(gaussian(50, 576), wbits=2, vq_dim=2, groupsize=2048)
    assert q.decoder.stored["centroids"].shape == (2, 7, 16, 2)
    rows = [8] + 6 * [7]
    for band in (slice(0, 288), slice(288, 576)):
        for part in q.dequantize()[:, band].split(rows):
            pairs = part.reshape(-1, 2).unique(dim=0)
            assert len(pairs) <= 16
    assert len(q.dequantize().reshape(-1, 2).unique(dim=0)) > 16


def test_each_code_is_that_of_the_weights_as_feedback_has_left_them(problem):
    """Scales divide running weights, not those that the group began with."""
    W, H = problem(12, 48)
    K, h = ldl(H, 2)
    book = Learned(scheme=scheme(columns=16, **KINDS["scaled"]), iterations=3, tile_count=2)
    codes, books = sweep(W, K, h, book, group=16)
    W_hat = decoded(codes, books, 16)
    running, errors, stale = W.clone(), torch.zeros_like(W), 0
    for lo in range(0, 48, 2):
        at = slice(lo, lo + 2)
        running[:, at] = W[:, at] + errors @ K[:, at]
        if lo % 16 == 0:
            group = W[:, lo : lo + 16] + errors @ K[:, lo : lo + 16]
            again = book.fit(group, h[lo : lo + 16])
            assert_near(again.scales, books[lo // 16].scales)
        served = books[lo // 16].at(lo % 16)
        expected = served.round(running[:, at], h[at])
        assert torch.equal(codes[:, lo // 2].long(), expected.long())
        old = served.round(group[:, lo % 16 : lo % 16 + 2], h[at])
        stale += int((old.long() != expected.long()).sum())
        errors[:, at] = running[:, at] - W_hat[:, at]
    assert stale > 0


def test_scales_are_near_to_the_largest_weights_of_their_runs():
    X = gaussian(30, 40) * gaussian(30, 1, seed=1).exp()
    scaling = LogScales(16)  # runs of 16, 16 and 8
    parts = scaling.fit(X, torch.ones(40))
    largest = torch.stack([x.abs().amax(1) for x in X.split(16, 1)], 1)
    off = (scaling.values(parts, torch.float32) / largest).log2().abs()
    half = parts["scale_range"][:, 1] / 2
    assert bool((off <= half + 1e-5).all())
    assert int(parts["scale_codes"].amin()) == 0
    assert int(parts["scale_codes"].amax()) == 15


def test_units_leave_less_error_than_the_largest_weight_as_7_units():
    X, h = gaussian(30, 256), torch.linspace(0.1, 2, 256)
    scaling = UnitScales(128)
    found = scaling.fit(X, h)["units"]
    assert torch.equal(found, found.bfloat16())

    def error(units: torch.Tensor) -> torch.Tensor:
        spread = units.float().repeat_interleave(128, 1)
        e = X - (X / spread).round().clamp(-8, 7) * spread
        return torch.stack([e[:, :128].square() @ h[:128], e[:, 128:].square() @ h[128:]], 1)

    largest = torch.stack([x.abs().amax(1) for x in X.split(128, 1)], 1) / 7
    ours, plain = error(found), error(largest.bfloat16())
    assert bool((ours <= plain * (1 + 1e-5)).all())
    assert float(ours.sum()) < 0.9 * float(plain.sum())


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_are_vectors_of_their_group(name):
    V = gaussian(3, 50).view(3, 50, 1).double()
    found = SEEDS[name](V, torch.ones_like(V), 8, torch.Generator().manual_seed(0))
    assert found.shape == (3, 8, 1)
    for group, seeds in zip(V, found, strict=True):
        assert set(seeds.flatten().tolist()) <= set(group.flatten().tolist())
        assert len(seeds.unique()) == 8


def test_mahalanobis_takes_even_ranks_of_the_distance_to_the_mean():
    V = (gaussian(40, 2).double() @ torch.tensor([[3.0, 1.0], [0.0, 0.2]]).double())[None]
    found = mahalanobis(V, torch.ones_like(V), 4, None)[0]
    centred = V[0] - V[0].mean(0)
    cov = centred.T @ centred / 40
    cov = cov + 0.01 * cov.diagonal().mean() * torch.eye(2).double()
    ranks = ((centred @ cov.inverse()) * centred).sum(1).argsort()
    assert torch.equal(found, V[0][ranks[[5, 15, 25, 35]]])


def test_quantiles_are_the_middles_of_equal_shares():
    V = torch.arange(12.0)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    assert cdf(V.view(1, 12, 1), torch.ones(1, 12, 1), 4, None).flatten().tolist() == [1, 4, 7, 10]


def test_kpp_draws_in_proportion_to_weighted_squares():
    V = torch.tensor([0.0, 1.0, 3.0]).double().expand(20_000, 3)[..., None]
    weight = torch.tensor([1.0, 0.0, 0.0]).double().expand(20_000, 3)[..., None]
    rng = torch.Generator().manual_seed(0)
    assert not kpp(V, weight, 1, rng).any()  # what weighs nothing is not the first
    weight = torch.tensor([10.0**9, 1.0, 1.0]).double().expand(20_000, 3)[..., None]
    second = kpp(V, weight, 2, rng)[:, 1, 0]
    # Of squares 1 and 9 the first is drawn once in ten; five standard errors.
    share = float((second == 1).double().mean())
    assert share == pytest.approx(0.1, abs=5 * (0.09 / 20_000) ** 0.5)


@pytest.mark.parametrize("seeds", SEEDS)
def test_the_codes_are_those_of_the_seed(seeds):
    W, before = gaussian(32, 64), torch.get_rng_state()
    flags = {"wbits": 3, "vq_dim": 1, "groupsize": 1024, "vq_seed": seeds}
    first, same, other = (quantized(W, seed=seed, **flags) for seed in (0, 0, 1))
    assert torch.equal(first.codes, same.codes)
    assert torch.equal(first.dequantize(), same.dequantize())
    assert torch.equal(first.dequantize(), other.dequantize()) == (seeds != "kpp")
    assert torch.equal(torch.get_rng_state(), before)


KINDS_BY_FLAGS = pytest.mark.parametrize(
    "flags",
    [
        {"vq_dim": 1, "wbits": 2},
        {"vq_dim": 1, "wbits": 2, "svd_rank": 0.5, "vq_seed": "cdf"},
        {"vq_dim": 2, "wbits": 1, "vq_scaling": 8, "vq_seed": "kpp"},
        {"vq_dim": 2, "wbits": 2, "codebook_bits": 4},
        {"vq_dim": 4, "wbits": 1, "codebook_bits": 16},
    ],
    ids=str,
)
ODD = {
    "constant": torch.full((8, 64), 0.3),
    "zero": torch.zeros(8, 64),
    "zero rows": gaussian(8, 64) * (torch.arange(8) % 3 == 0)[:, None],
    "two values": gaussian(8, 64).sign(),
    "tiny": 1e-15 * gaussian(8, 64),
    "huge": 1e15 * gaussian(8, 64),
    "float64": gaussian(8, 64, dtype=torch.float64),
    "bfloat16": gaussian(8, 64).bfloat16(),
}


@pytest.mark.parametrize("name", ODD)
@KINDS_BY_FLAGS
def test_odd_weights_leave_codebooks_that_are_finite_and_no_worse_than_zero(name, flags):
    W, how = ODD[name], {**flags, "groupsize": 256, "columns_per_group": 128}
    q = quantized(W, **how, codebook_update="cg", npasses=1)
    W_hat = q.dequantize()
    assert bool(W_hat.isfinite().all())
    check_stored(q.decoder, *W.shape)
    E = W_hat.double() - W.double()
    assert float(E.square().sum()) <= float(W.double().square().sum()) + 1e-60
    if name in ("constant", "two values") and "codebook_bits" not in flags:
        assert float(E.abs().max()) < 0.02 * float(W.abs().max())


@KINDS_BY_FLAGS
@pytest.mark.parametrize("unit", [2.0**-20, 2.0**20])
def test_codes_do_not_depend_on_the_unit_of_weights(flags, unit):
    W, how = gaussian(8, 64), {**flags, "groupsize": 256, "codebook_update": "cg", "npasses": 1}
    assert torch.equal(quantized(unit * W, **how).codes, quantized(W, **how).codes)


def test_rows_of_zeros_have_zeros_where_their_codebook_has_room():
    W = torch.cat([torch.zeros(4, 64), gaussian(4, 64)])
    q = quantized(W, vq_dim=1, wbits=2, groupsize=256)  # tiles of 4 rows
    assert not q.dequantize()[:4].any()


@pytest.mark.parametrize("n", [64, 66])
def test_codes_of_more_than_eight_bits_come_back(n):
    W = gaussian(256, n)
    q = quantized(W, vq_dim=2, wbits=6, codebook_update="cg")  # k = 4096
    assert q.decoder.index_bits == 12
    assert int(q.codes.max()) > 255
    tensors = q.tensors()
    again = Centroids.restore(tensors, 256, n, **q.decoder.options())
    codes = unpack(tensors["codes"], 12, n // 2)
    assert torch.equal(again.decode(codes), q.decoder.decode(q.codes))
    # Of 8,192 vectors or so half are centroids of their own.
    assert float((q.dequantize() - W).square().mean()) < 0.02


def test_vectors_of_four_have_up_to_sixteen_bits():
    book = Learned(scheme=scheme(dim=4, bits=4), iterations=1)
    X = gaussian(512, 512)
    fitted = book.fit(X, torch.ones(512))
    assert fitted.centroids.shape == (1, 65536, 4)
    codes = fitted.round(X[:, :4], torch.ones(4))
    assert int(codes.max()) > 2**15


def test_errors_can_weigh_all_alike():
    X, h = gaussian(16, 32), torch.linspace(0.01, 5, 32)
    book = Learned(scheme=scheme(**KINDS["8 bits"]), iterations=5)
    plain = replace(book, weighted=False)
    assert torch.equal(plain.fit(X, h).centroids, book.fit(X, torch.ones(32)).centroids)
    assert not torch.equal(plain.fit(X, h).centroids, book.fit(X, h).centroids)
