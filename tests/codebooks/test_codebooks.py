from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.codebooks import Codebook, MinMaxGrid, RmsGrid, SymmetricGrid, candidate_rhos
from quip.codebooks.fitted import Fitted, chosen, one_after_another, side_by_side
from tests import reference as ref
from tests.laws import CODEBOOKS, assert_near, check_codebook, every_point

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
BOOKS = pytest.mark.parametrize("book", CODEBOOKS.values(), ids=CODEBOOKS.keys())
# A step is stored in bfloat16: 8 significant bits.
STEP = 2**-8
DOUBLE = {"step_dtype": torch.float64}


def weights(m: int, n: int, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=rng, dtype=torch.float64) + shift


def ones(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.float64)


def grid(kind: str, bits: int, **options):
    return (
        MinMaxGrid(bits=bits, **options)
        if kind == "row"
        else RmsGrid(bits=bits, rhos=(2.4,), **options)
    )


GRIDS = pytest.mark.parametrize("kind", ["row", "tensor"])


@BOOKS
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_codebooks_obey_the_laws(book, shift):
    h = torch.rand(8, generator=torch.Generator().manual_seed(1)).double() + 0.1
    check_codebook(book, weights(6, 8, shift=shift), h)


@BOOKS
def test_codebooks_say_what_they_are(book):
    assert isinstance(book, Codebook)
    assert every_point(book.fit(weights(6, 8), ones(8)), 6).shape == (
        2**book.index_bits,
        6,
        book.dim,
    )


@given(m=st.integers(1, 5), g=st.integers(1, 9), bits=st.integers(2, 8), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_grids_of_any_shape_obey_the_laws(m, g, bits, seed):
    X = weights(m, g, seed=seed)
    check_codebook(MinMaxGrid(bits=bits), X, ones(g))
    check_codebook(RmsGrid(bits=bits, rhos=candidate_rhos(bits)), X, ones(g))
    check_codebook(SymmetricGrid(bits=bits, shares=(0.7, 1.0)), X, ones(g))


@BITS
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_the_row_grid_is_the_papers(bits, shift):
    X = weights(6, 30, shift=shift)
    book = MinMaxGrid(bits=bits, **DOUBLE).fit(X, ones(30))
    step, zero = ref.minmax_grid(X, bits)
    assert_near(book.step.squeeze(1), step)
    assert torch.equal(book.zero.squeeze(1), zero)
    expected = torch.stack([ref.minmax_rounding(X, bits)(x) for x in X.T], dim=1)
    assert_near(book.snap(X), expected)


@BITS
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_the_symmetric_grid_is_that_of_gptq(bits, shift):
    X = weights(6, 30, shift=shift)
    book = SymmetricGrid(bits=bits, shares=(1.0,), **DOUBLE).fit(X, ones(30))
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).double()
    assert_near(every_point(book, 6)[:, :, 0], levels[:, None] * book.step.T)
    assert float(((X - book.snap(X)).abs() / book.step).max()) <= 0.5 + 1e-9
    # A share of 1 leaves the largest weight half a step from its level: a tie, but for noise.
    book = SymmetricGrid(bits=bits, shares=(0.9,), **DOUBLE).fit(X, ones(30))
    expected = torch.stack([ref.symmetric_rounding(X, bits, 0.9)(x) for x in X.T], dim=1)
    assert_near(book.snap(X), expected)


@BITS
def test_each_row_of_a_symmetric_grid_has_the_share_of_the_least_weighted_error(bits):
    X, h = weights(6, 30), torch.linspace(0.1, 3, 30, dtype=torch.float64)
    shares = (0.4, 0.6, 0.8, 1.0, 1.1)
    book = SymmetricGrid(bits=bits, shares=shares, **DOUBLE).fit(X, h)
    for row, step in zip(X.split(1), book.step[:, 0], strict=True):

        def error(share: float, row: torch.Tensor = row) -> float:
            snap = ref.symmetric_rounding(row, bits, share)
            snapped = torch.stack([snap(x) for x in row.T], dim=1)
            return float(((row - snapped).square() @ h).sum())

        best = min(shares, key=error)
        assert_near(step, 2 * best / (2**bits - 1) * row.abs().max())


@BITS
def test_the_rms_grid_is_the_papers(bits):
    X = weights(6, 30)
    book = RmsGrid(bits=bits, rhos=(2.4,), **DOUBLE).fit(X, ones(30))
    expected = torch.stack([ref.rms_rounding(X, bits, 2.4)(x) for x in X.T], dim=1)
    assert_near(book.snap(X), expected)
    s = 2.4 * float(X.square().mean().sqrt())
    levels = every_point(book, 1).flatten()
    assert_near(levels, torch.linspace(-s, s, 2**bits, dtype=torch.float64))


@BITS
def test_the_best_of_several_ranges_has_the_least_weighted_error(bits):
    X, h = weights(6, 30), torch.linspace(0.1, 3, 30, dtype=torch.float64)
    rhos = candidate_rhos(bits)
    book = RmsGrid(bits=bits, rhos=rhos, **DOUBLE).fit(X, h)

    def error(rho: float) -> float:
        snapped = torch.stack([ref.rms_rounding(X, bits, rho)(x) for x in X.T], dim=1)
        return float(((X - snapped).square() @ h).sum())

    best = min(rhos, key=error)
    assert_near(book.step, 2 * best / (2**bits - 1) * X.square().mean().sqrt())


def test_the_best_range_depends_on_the_weights_of_the_errors():
    X = torch.cat([weights(50, 1), 8 * weights(50, 1, seed=1)], dim=1)
    fits = [
        RmsGrid(bits=2, rhos=candidate_rhos(2)).fit(X, torch.tensor(h, dtype=torch.float64))
        for h in ([1.0, 1e-6], [1e-6, 1.0])
    ]
    assert float(fits[0].step) < float(fits[1].step)


def test_ranges_are_searched_around_the_best_for_gaussian_weights():
    for bits, best in ((2, 1.494), (3, 2.051), (4, 2.514)):  # specification, section 9.3
        rhos = candidate_rhos(bits)
        assert len(rhos) == 10
        assert list(rhos) == sorted(rhos)
        assert rhos[0] < 0.8 * best
        assert rhos[-1] > 1.5 * best


def test_many_rows_are_measured_in_portions_with_the_same_result():
    X, h = weights(40, 6), ones(6)
    book = RmsGrid(bits=3, rhos=candidate_rhos(3))
    whole = book.fit(X, h).step
    assert torch.equal(book.fit(X, h, chunk=13).step, whole)


@GRIDS
@BITS
def test_steps_are_used_as_they_are_stored(kind, bits):
    X = weights(6, 30)
    stored = grid(kind, bits).fit(X, ones(30))
    exact = grid(kind, bits, **DOUBLE).fit(X, ones(30))
    assert torch.equal(stored.step, stored.step.bfloat16().double())
    torch.testing.assert_close(stored.step, exact.step, rtol=STEP, atol=0)


@BITS
def test_a_row_grid_holds_an_exact_zero(bits):
    book = MinMaxGrid(bits=bits).fit(weights(6, 30, shift=1.0), ones(30))
    zero = torch.zeros(6, 1, dtype=torch.float64)
    assert bool((book.decode(book.round(zero, ones(1))) == 0).all())


@BITS
@pytest.mark.parametrize("shift", [0.0, 9.0, -9.0])
def test_a_zero_is_a_code(bits, shift):
    # Among many rows below 0 are some whose step, rounded down, would put it past the last code.
    book = MinMaxGrid(bits=bits).fit(weights(500, 30, shift=shift), ones(30))
    assert torch.equal(book.zero, book.zero.round())
    assert 0 <= float(book.zero.min()) <= float(book.zero.max()) < 2**bits


@GRIDS
def test_ties_go_up(kind):
    fitted = grid(kind, 3).fit(weights(6, 30), ones(30))
    levels = every_point(fitted, 6)
    between = (levels[1:] + levels[:-1]) / 2
    # Steps of 8 significant bits make the halves exact.
    for c, tie in enumerate(between):
        assert torch.equal(fitted.round(tie, ones(1)).int(), torch.full((6,), c + 1).int())


@GRIDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_all_zero_stays_finite_and_nearly_zero(kind, dtype):
    X = torch.zeros(6, 30, dtype=dtype)
    fitted = grid(kind, 2).fit(X, ones(30).to(dtype))
    assert bool((fitted.step > 0).all())
    tiny = 2 * torch.finfo(torch.bfloat16).tiny  # any positive step will do: the least there is
    assert float(fitted.snap(X).abs().max()) < tiny
    assert float(fitted.clamp(X).abs().max()) < tiny


@GRIDS
def test_weights_too_small_for_half_precision_do_not_vanish(kind):
    X = 1e-9 * weights(6, 30).float()
    fitted = grid(kind, 4).fit(X, ones(30).float())
    # A quarter of the weights' size: far more than 4 bits leave, far less than losing them all.
    assert float((fitted.snap(X) - X).norm() / X.norm()) < 0.25


@GRIDS
def test_rounding_follows_the_precision_of_the_weights(kind):
    X = weights(6, 30).float()
    fitted = grid(kind, 4).fit(X, ones(30).float())
    codes = fitted.round(X[:, :1], ones(1).float())
    assert codes.dtype == torch.uint8
    assert fitted.decode(codes).dtype == torch.float32
    assert torch.equal(fitted.decode(codes), fitted.decode(codes.long()))


@GRIDS
def test_unbiased_rounding_has_the_right_mean(kind):
    X = weights(1, 30).clamp(-1, 1)
    fitted = grid(kind, 2, unbiased=True).fit(X, ones(30))
    fitted = fitted.seeded(torch.Generator().manual_seed(5))
    for x in fitted.clamp(X)[0, :5]:
        column = x.expand(20_000, 1)
        mean = float(fitted.decode(fitted.round(column, ones(1))).mean())
        # One draw spreads by half a step at most; five standard errors.
        assert mean == pytest.approx(float(x), abs=5 * float(fitted.step.max()) / 2 / 20_000**0.5)


@GRIDS
def test_unbiased_rounding_draws_from_the_generator_it_was_given(kind):
    X = weights(50, 4)
    fitted = grid(kind, 2, unbiased=True).fit(X, ones(4))
    before = torch.get_rng_state()
    first, same, other = (
        fitted.seeded(torch.Generator().manual_seed(seed)).round(X[:, :1], ones(1))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert fitted.seeded(torch.Generator()).rng is not None


@GRIDS
def test_unbiased_rounding_leaves_levels_alone(kind):
    fitted = grid(kind, 3, unbiased=True).fit(weights(6, 30), ones(30))
    fitted = fitted.seeded(torch.Generator().manual_seed(0))
    for c, level in enumerate(every_point(fitted, 6)):
        # The levels are code + rounding noise, of which a draw makes a code less only by chance.
        assert torch.equal(fitted.round(level, ones(1)).int(), torch.full((6,), c).int())


def test_books_that_are_made_when_asked_for_are_those_of_a_list():
    book, steps = grid("rms", 2).fit(weights(5, 4), ones(4)), torch.rand(7) + 0.1
    lazy = Fitted(book, steps, "step")
    books = [replace(book, step=step) for step in steps]
    assert list(lazy) == books
    assert [lazy[i] for i in range(len(lazy))] == books
    assert list(lazy[2:5]) == books[2:5]
    places = [3, 0, 6]
    assert list(chosen(lazy, places)) == list(chosen(books, places)) == [books[i] for i in places]
    for parts in ([lazy[:3], lazy[3:]], [books[:3], books[3:]], [lazy[:3], books[3:]]):
        assert list(one_after_another(parts)) == books
    for name in ("step", "zero"):
        assert torch.equal(side_by_side(lazy, name), side_by_side(books, name))
        assert torch.equal(side_by_side(lazy[:1], name), side_by_side(books[:1], name))
