"""Polishes never lose; codes over rows move as whole tiles."""

import pytest
import torch

from quip.codebooks import Trellis
from quip.codebooks.base import tiles
from quip.matrix.feedback import ldl
from quip.matrix.linalg import energy
from quip.matrix.polish import Greedy, greedy
from quip.matrix.quantize import quantize_matrix
from quip.matrix.recipe import Recipe, describe
from quip.matrix.seeds import rng_for
from quip.matrix.sweep import sweep
from tests.laws import (
    CODEBOOKS,
    LEARNED,
    POLISHES,
    TILED,
    UPDATES,
    Steps,
    check_polish,
    check_tiles,
    decoded,
)

BOOKS = CODEBOOKS | TILED
LARGE = {*LEARNED, *(name for name, book in TILED.items() if isinstance(book, Trellis))}


@pytest.mark.parametrize("polish", POLISHES.values(), ids=POLISHES.keys())
@pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS.keys())
@pytest.mark.parametrize("group", [None, 8, 24])
def test_polishes_obey_the_laws(problem, book, polish, group):
    check_polish(polish, book, *problem(18, 40), group)


@pytest.mark.parametrize("polish", UPDATES.values(), ids=UPDATES.keys())
@pytest.mark.parametrize("book", LEARNED.values(), ids=LEARNED.keys())
@pytest.mark.parametrize("group", [None, 8, 24])
def test_updates_of_centroids_obey_the_laws(problem, book, polish, group):
    check_polish(polish, book, *problem(18, 40), group)


@pytest.mark.parametrize(
    ("name", "m"),
    [(name, m) for name in BOOKS for m in (1, 3, 9, 18, 21) if m > 3 or name not in LARGE],
)
def test_tiles_of_rows_stand_alone(problem, name, m):
    W, H = problem(m, 40)
    check_tiles(BOOKS[name], W, H.diagonal())


@pytest.mark.parametrize(
    ("m", "rows", "sizes"),
    [(5, 1, [1] * 5), (576, 256, [288, 288]), (192, 256, [192]), (7, 3, [4, 3]), (1, 256, [1])],
)
def test_rows_are_cut_into_tiles_as_even_as_can_be(m, rows, sizes):
    assert tiles(m, rows) == sizes


def test_a_tile_moves_as_a_whole_or_stays(problem):
    W, H = problem(12, 30)
    K, h = ldl(H)
    book = Steps(4).fit(W, h)
    codes, books = sweep(W, K, h, book)
    better = greedy(W, H, codes, books, passes=1)
    errors = [decoded(c, books, None) - W for c in (codes, better)]
    losses = [torch.stack([((e @ H) * e).sum() for e in E.split(4)]) for E in errors]
    assert bool((losses[1] <= losses[0] * (1 + 1e-12)).all())
    assert bool((losses[1] < losses[0]).any())


def test_a_matrix_of_codes_over_rows_goes_through_the_whole_recipe(problem):
    W, H = problem(18, 40)
    plain = Recipe(codebook=Steps(6))
    found = {
        passes: quantize_matrix(W, H, recipe, rng=rng_for(0, "w"))
        for passes, recipe in {
            0: plain,
            2: Recipe(codebook=Steps(6), polish=(Greedy(2),)),
        }.items()
    }
    losses = {k: energy(q.dequantize().double() - W, H) for k, q in found.items()}
    assert losses[2] < losses[0] < energy(W, H)


def test_polishes_follow_one_another(problem):
    W, H = problem(9, 40)
    book = CODEBOOKS["rms, 2 bits"]
    once, twice = (
        quantize_matrix(W, H, Recipe(codebook=book, polish=polish), rng=rng_for(0, "w"))
        for polish in ((Greedy(3),), (Greedy(1), Greedy(2)))
    )
    assert torch.equal(once.codes, twice.codes)
    assert describe(Recipe(codebook=book, polish=(Greedy(1), Greedy(2))))["greedy_passes"] == 3
