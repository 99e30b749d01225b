"""The update of learned centroids: the least squares that it solves, and what it may not do."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quip.codebooks import Learned
from quip.codebooks.base import even
from quip.codebooks.centroids import Scheme
from quip.matrix import centroids
from quip.matrix.build import build_recipe
from quip.matrix.centroids import UpdateCentroids
from quip.matrix.feedback import ldl
from quip.matrix.linalg import energy
from quip.matrix.quantize import quantize_matrix
from quip.matrix.seeds import rng_for
from quip.matrix.sweep import sweep
from tests.laws import NOISE, decoded

M, N, BAND, TILES = 14, 40, 16, 3  # bands of 16, 16 and 8 columns; tiles of 5, 5 and 4 rows
KINDS = {
    "1D": {"dim": 1, "bits": 2, "entry_bits": 16},
    "2D": {"dim": 2, "bits": 2, "entry_bits": 16},
    "4D": {"dim": 4, "bits": 1, "entry_bits": 16},
    "2D, scaled": {"dim": 2, "bits": 1, "entry_bits": 16, "run": 4},
}
ROUNDED = {
    "8 bits": {"dim": 2, "bits": 1},
    "8 bits, one scale": {"dim": 2, "bits": 1, "shared": True},
    "4 bits": {"dim": 2, "bits": 1, "entry_bits": 4, "run": 4},
    "low rank": {"dim": 1, "bits": 3, "entry_bits": 16, "rank": 2},
    **KINDS,
}
BY_KIND = pytest.mark.parametrize("kind", KINDS)
BY_ROUNDING = pytest.mark.parametrize("kind", ROUNDED)


def swept(problem, kind: str, *, noise: float = 0.0, seed: int = 0):
    """W, H, codes and books of a sweep; with noise the centroids are moved away from the best."""
    W, H = problem(M, N, seed=seed)
    scheme = Scheme(weights=None, columns=None, **ROUNDED[kind])
    book = Learned(scheme=scheme, iterations=3, tile_count=TILES)
    K, h = ldl(H, book.dim)
    codes, books = sweep(W, K, h, book, group=BAND)
    rng = torch.Generator().manual_seed(seed)

    def moved(book: Learned) -> Learned:
        c = book.centroids
        c = c * (1 + noise * torch.randn(c.shape, generator=rng, dtype=c.dtype))
        return book.with_centroids(c, torch.ones_like(c[..., 0]))

    return W, H, codes, [moved(book) for book in books] if noise else books


def loss(W: Tensor, H: Tensor, codes: Tensor, books) -> float:
    return energy(decoded(codes, books, BAND) - W, H)


def by_tile(W: Tensor, H: Tensor, codes: Tensor, books) -> Tensor:
    E = decoded(codes, books, BAND) - W
    return torch.stack([((e @ H) * e).sum() for e in E.split(even(M, TILES))])


def least(W: Tensor, H: Tensor, codes: Tensor, books) -> float:
    """The smallest loss of any centroids, by dense least squares over all that there are."""
    first = books[0]
    (_, k, d), C = first.centroids.shape, len(books)
    R = torch.linalg.cholesky(H).T  # ||R e||^2 = e^T H e
    total, lo = 0.0, 0
    for rows in even(M, TILES):
        A = torch.zeros(rows, N, C * k * d, dtype=torch.float64)
        for r in range(rows):
            for column in range(N):
                band, place = column // BAND, column % d
                scales = books[band].scales
                at = (column % BAND) // first.scheme.run if scales is not None else 0
                s = 1.0 if scales is None else float(scales[lo + r, at])
                entry = (band * k + int(codes[lo + r, column // d])) * d + place
                A[r, column, entry] = s
        wanted = W[lo : lo + rows]
        dense, right = (R @ A).reshape(rows * N, -1), (wanted @ R.T).reshape(-1, 1)
        found = torch.linalg.lstsq(dense, right, driver="gelsd").solution
        total += float((dense @ found - right).square().sum())
        lo += rows
    return total


@BY_KIND
def test_it_reaches_the_least_squares(problem, kind, monkeypatch):
    monkeypatch.setattr(centroids, "SETTLED", 0.0)
    W, H, codes, books = swept(problem, kind)
    best = least(W, H, codes, books)
    assert loss(W, H, codes, books) > best * 1.001
    part = next(centroids._cut(W, H, codes, books, BAND))
    found = part.solve(torch.stack([book.centroids for book in books]), 1000)[0]
    assert float(part.losses(found).sum()) == pytest.approx(best, rel=1e-8)
    _, new = UpdateCentroids(1000)(W, H, codes, books, group=BAND)
    # Entries of 16 bits are off by 2^-11 of themselves, of which an ill-conditioned H makes more.
    assert loss(W, H, codes, new) < best * 1.01


@BY_KIND
def test_every_step_lowers_the_loss(problem, kind, monkeypatch):
    monkeypatch.setattr(centroids, "SETTLED", 0.0)
    W, H, codes, books = swept(problem, kind, noise=0.2)
    part, *others = centroids._cut(W, H, codes, books, BAND)
    assert not others
    old = torch.stack([book.centroids for book in books])
    losses = torch.stack([part.losses(part.solve(old, steps)[0]) for steps in range(12)])
    assert float(losses[0].sum()) == pytest.approx(loss(W, H, codes, books))
    assert bool((losses[1:] <= losses[:-1] * (1 + NOISE)).all())
    assert float(losses[-1].sum()) < 0.9 * float(losses[0].sum())


def test_it_stops_when_a_step_is_worth_nothing(problem, monkeypatch):
    W, H, codes, books = swept(problem, "2D", noise=0.2)
    part = next(centroids._cut(W, H, codes, books, BAND))
    old = torch.stack([book.centroids for book in books])
    counted = []
    plain = part._decode
    monkeypatch.setattr(type(part), "_decode", lambda self, c: counted.append(1) or plain(c))
    found = part.solve(old, 1000)[0]
    assert len(counted) < 100
    monkeypatch.setattr(centroids, "SETTLED", 0.0)
    best, start = (part.losses(part.solve(old, steps)[0]).sum() for steps in (1000, 0))
    # The steps that are left out are each worth less than 1e-4 of the start, but for a few.
    assert float(part.losses(found).sum() - best) < 0.02 * float(start)


@BY_ROUNDING
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_never_rises_once_centroids_are_rounded(problem, kind, seed):
    W, H, codes, books = swept(problem, kind, noise=0.1, seed=seed)
    before = [(book.centroids.clone(), dict(book.stored)) for book in books]
    given = codes.clone()
    same, new = UpdateCentroids(30)(W, H, codes, books, group=BAND)
    assert same is codes
    assert torch.equal(codes, given)
    assert all(torch.equal(b.centroids, c) for b, (c, _) in zip(books, before, strict=True))
    for book in new:  # as they will be read
        stored = book.scheme.entries.load(book.stored, torch.float64)
        assert torch.equal(stored, book.centroids)
        assert book.scale_parts is not None
    if books[0].scheme.entries.apart:
        old, now = by_tile(W, H, codes, books), by_tile(W, H, codes, new)
        assert bool((now <= old * (1 + NOISE)).all())
    assert loss(W, H, codes, new) <= loss(W, H, codes, books) * (1 + NOISE)


def test_a_tile_whose_loss_would_rise_keeps_its_centroids(problem, monkeypatch):
    """Centroids that rounding spoils in one tile are refused there, and taken in the others."""
    W, H, codes, books = swept(problem, "8 bits", noise=0.2)
    plain = Learned.with_centroids

    def spoilt(self: Learned, c: Tensor, mass: Tensor) -> Learned:
        c = c.clone()
        c[1] *= 3
        return plain(self, c, mass)

    monkeypatch.setattr(Learned, "with_centroids", spoilt)
    _, new = UpdateCentroids(30)(W, H, codes, books, group=BAND)
    for old, now in zip(books, new, strict=True):
        assert torch.equal(now.centroids[1], old.centroids[1])
        assert not torch.equal(now.centroids[0], old.centroids[0])
        for name, x in now.stored.items():
            assert torch.equal(x[1], old.stored[name][1])
    old, now = by_tile(W, H, codes, books), by_tile(W, H, codes, new)
    assert torch.equal(now[1], old[1])
    assert bool((now[[0, 2]] < old[[0, 2]]).all())


@pytest.mark.parametrize("kind", ["8 bits, one scale", "low rank"])
def test_codebooks_of_one_scale_are_taken_or_left_as_a_whole(problem, kind, monkeypatch):
    W, H, codes, books = swept(problem, kind, noise=0.2)
    _, new = UpdateCentroids(30)(W, H, codes, books, group=BAND)
    assert loss(W, H, codes, new) < loss(W, H, codes, books)
    plain = Learned.with_centroids
    spoilt = lambda self, c, mass: plain(self, 5 * c, mass)  # noqa: E731
    monkeypatch.setattr(Learned, "with_centroids", spoilt)
    _, new = UpdateCentroids(30)(W, H, codes, books, group=BAND)
    assert all(a is b for a, b in zip(new, books, strict=True))


@BY_ROUNDING
def test_tiles_solved_by_parts_are_those_solved_at_once(problem, kind, monkeypatch):
    monkeypatch.setattr(centroids, "SETTLED", 0.0)  # which is of all tiles that are solved together
    W, H, codes, books = swept(problem, kind, noise=0.1)
    _, whole = UpdateCentroids(8)(W, H, codes, books, group=BAND)
    monkeypatch.setattr(centroids, "CHUNK", 1)
    assert len([*centroids._cut(W, H, codes, books, BAND)]) == TILES
    _, parts = UpdateCentroids(8)(W, H, codes, books, group=BAND)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a.centroids, b.centroids, rtol=1e-9, atol=1e-9)


@BY_KIND
def test_one_group_of_all_columns_is_solved_too(problem, kind):
    W, H = problem(M, N)
    scheme = Scheme(weights=None, columns=None, **KINDS[kind])
    book = Learned(scheme=scheme, iterations=3, tile_count=TILES).fit(W, H.diagonal())
    codes, books = sweep(W, *ldl(H, book.dim), book)
    _, new = UpdateCentroids(30)(W, H, codes, books)
    before, after = (energy(decoded(codes, b, None) - W, H) for b in (books, new))
    assert after < before


def test_inputs_that_are_always_zero_do_no_harm(problem):
    W, H = problem(M, N, dead=(0, 1, 2, 3, 17))
    W[:, [0, 1, 2, 3, 17]] = 0
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(N).double()
    scheme = Scheme(weights=None, columns=None, **KINDS["2D"])
    book = Learned(scheme=scheme, iterations=3, tile_count=TILES)
    codes, books = sweep(W, *ldl(damped, 2), book, group=BAND)
    _, new = UpdateCentroids(30)(W, H, codes, books, group=BAND)
    assert all(bool(b.centroids.isfinite().all()) for b in new)
    assert loss(W, H, codes, new) < loss(W, H, codes, books)
    none = torch.zeros_like(H)
    _, same = UpdateCentroids(30)(W, none, codes, books, group=BAND)
    assert all(torch.equal(a.centroids, b.centroids) for a, b in zip(same, books, strict=True))


def test_float32_is_solved_as_well_as_float64(problem):
    W, H, codes, books = swept(problem, "2D", noise=0.1)
    single = [
        replace(book, centroids=book.centroids.float(), scales=book.scales and book.scales.float())
        for book in books
    ]
    _, new = UpdateCentroids(30)(W, H, codes, books, group=BAND)
    _, less = UpdateCentroids(30)(W.float(), H, codes, single, group=BAND)
    assert loss(W, H, codes, less) < loss(W, H, codes, new) * 1.01


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("quant", ["gptq", "ldlq", "ldlqRG", "nearest", "allbal"])
def test_updates_help_every_method(problem, dim, quant):
    """In any order of columns, through the whole recipe: codebooks come back where they belong."""
    W, H = problem(24, 48)
    flags = {"codebook": "vq", "wbits": 1, "vq_dim": dim, "groupsize": 200, "em_iters": 3}
    flags |= {"columns_per_group": 16, "quant": quant, "rotation": "none"}
    plain, updated = (
        quantize_matrix(W, H, build_recipe(**flags, codebook_update=how), rng=rng_for(0, "w"))
        for how in ("none", "cg")
    )
    a, b = (energy(q.dequantize().double() - W, H) for q in (plain, updated))
    assert b < a < energy(W, H)
