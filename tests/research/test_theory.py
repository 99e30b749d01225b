"""The bench under `quip theory`: whole numbers, problems, verdicts, integrals and pictures."""

import math

import pytest
import torch

from quip.codebooks import MinMaxGrid, RmsGrid
from quip.codebooks.base import Codebook, Groups
from quip.matrix.build import build_recipe
from quip.research.theory import GROUPS, Claim, Settings, gaussian, integers, measure, problems
from quip.research.theory.claims import mean
from quip.research.theory.plots import plot_bounds, plot_equalities
from tests import reference as ref

SMALL = Settings(n=16, rows=200, samples=3)


def test_integers_round_to_the_nearest_and_have_no_ends():
    book, h = integers.Integers(), torch.ones(1)
    x = torch.tensor([[-3.5], [-0.51], [0.49], [0.5], [1e6 + 0.4]], dtype=torch.float64)
    codes = book.round(x, h)
    assert codes.tolist() == [-3, -1, 0, 1, 1_000_000]
    assert torch.equal(book.decode(codes).squeeze(1), codes.double())
    assert book.fit(x, h) is book
    assert torch.equal(book.clamp(x), x)
    assert isinstance(book, Codebook)
    with pytest.raises(NotImplementedError, match="no file"):
        book.joined([book], Groups(1, None))


def test_integers_with_a_generator_round_up_as_often_as_the_fraction_says(rng):
    book = integers.Integers().seeded(rng)
    codes = book.round(torch.full((20_000, 1), -1.3, dtype=torch.float64), torch.ones(1))
    assert set(codes.tolist()) == {-2, -1}
    assert float(codes.double().mean()) == pytest.approx(-1.3, abs=0.02)


def test_a_grid_holds_the_codes_of_its_bits_and_none_is_all_numbers():
    x = torch.tensor([[-5.0], [0.5], [2.4], [9.0]], dtype=torch.float64)
    book = integers.grid(2)
    assert isinstance(book, MinMaxGrid)
    assert book.round(x, torch.ones(1)).tolist() == [0, 1, 2, 3]
    assert integers.grid(None) == integers.Integers()


@pytest.mark.parametrize("name", ["nearest", "gptq", "ldlq", "ldlqRG", "allbal"])
def test_methods_in_code_units_are_the_papers(name):
    W, H = ref.correlated_problem(5, 24)
    W = 3 * W
    passes = {"ldlqRG": 10, "allbal": 10}.get(name, 0)
    order = {"gptq": ref.natural, "nearest": ref.natural, "ldlq": ref.backwards}.get(
        name, ref.largest_first
    )(H)
    if name == "nearest":
        expected = ref.nearest(W, 2)
    elif name == "allbal":
        expected = W
    else:
        expected = ref.ldlq(W, H, lambda t: ref.nearest(t, 2), order)
    expected = ref.greedy(W, expected, H, 2, passes, order)
    assert torch.equal(
        integers.round_by(build_recipe(quant=name, wbits=2), W, H, integers.grid(2)), expected
    )


def test_the_losses_of_rows_sum_to_the_papers():
    W, H = ref.correlated_problem(6, 20)
    losses = integers.row_losses(W, W.round(), H)
    assert losses.shape == (6,)
    assert float(losses.sum()) == pytest.approx(ref.trace_loss(W, W.round(), H))


def test_a_hessian_has_the_spectrum_it_is_given_and_its_incoherence(rng):
    values = torch.tensor([5.0, 3.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    H = problems.with_spectrum(values, rng)
    torch.testing.assert_close(torch.linalg.eigvalsh(H).flip(0), values, rtol=0, atol=1e-12)
    mu, root = problems.spectral(H)
    carriers = torch.linalg.eigh(H)[1][:, 3:]  # of the eigenvalues that are not 0
    assert mu == pytest.approx(6**0.5 * float(carriers.abs().max()))
    assert root == pytest.approx((5**0.5 + 3**0.5 + 0.5**0.5) ** 2)
    assert problems.spectral(torch.diag(values))[0] == pytest.approx(6**0.5)


def test_a_correlated_hessian_is_positive_definite_and_far_from_diagonal(rng):
    H = problems.correlated_hessian(40, rng)
    assert torch.equal(H, H.T)
    assert float(torch.linalg.eigvalsh(H)[0]) >= 0.009 * float(H.diagonal().mean())
    assert float(ref.ldl(H)[1].sum()) < 0.8 * float(H.trace())


def claim(relation: str, measured: float, **fields) -> Claim:
    return Claim(
        name="a", quantity="b", relation=relation, formula="c", measured=measured, **fields
    )


@pytest.mark.parametrize(
    ("relation", "measured", "verdict"),
    [
        ("=", 1.039, "holds"),
        ("=", 1.041, "violated"),
        ("=", 0.959, "violated"),
        ("<=", 0.5, "holds"),
        ("<=", 0.97, "attained"),
        ("<=", 1.03, "attained"),
        ("<=", 1.05, "violated"),
        (">=", 1.5, "holds"),
        (">=", 1.03, "attained"),
        (">=", 0.9, "violated"),
    ],
)
def test_a_verdict_allows_four_standard_errors(relation, measured, verdict):
    one = claim(relation, measured, predicted=1.0, std_error=0.01)
    assert (one.verdict, one.ratio) == (verdict, measured)
    assert one.to_row()["verdict"] == verdict


def test_without_draws_only_rounding_noise_is_allowed():
    assert claim("=", 1 + 1e-9, predicted=1.0).verdict == "holds"
    assert claim("=", 1 + 1e-7, predicted=1.0).verdict == "violated"
    assert claim("=", 1.04, predicted=1.0, tolerance=0.05).verdict == "holds"


def test_a_mean_comes_with_its_standard_error(rng):
    x = torch.randn(10_000, generator=rng, dtype=torch.float64)
    found = mean(x)
    assert found["measured"] == float(x.mean())
    assert found["std_error"] == pytest.approx(0.01, rel=0.05)
    assert mean(x[:1])["std_error"] == 0


def test_claims_depend_on_the_seed_and_not_on_their_company():
    both = measure(SMALL, ["lemma3", "lemma12"])
    assert list(both) == ["lemma3", "lemma12"]
    assert measure(SMALL, ["lemma12"])["lemma12"] == both["lemma12"]
    other = Settings(n=16, rows=200, samples=3, seed=1)
    assert measure(other, ["lemma12"])["lemma12"] != both["lemma12"]


@pytest.mark.parametrize(("bits", "rho"), [(1, 0.8), (2, 1.5), (3, 2.4), (4, 1.0)])
def test_the_error_of_gaussian_weights_is_the_integral(bits, rho):
    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    top = 2**bits - 1
    step = torch.tensor(2 * rho / top, dtype=torch.float64)
    book = RmsGrid(bits=bits, rhos=(rho,), step=step, zero=torch.full_like(step, top / 2))
    expected = float(((book.snap(x) - x) ** 2 * density).sum())
    assert gaussian.gaussian_error(bits, rho) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_best_rho_has_the_least_error(bits):
    best = gaussian.best_rho(bits)
    least = gaussian.gaussian_error(bits, best)
    assert all(gaussian.gaussian_error(bits, best + by) > least for by in (-0.01, 0.01))


def test_the_expected_incoherence_of_two_dimensions_is_that_of_four_angles():
    # Entries sqrt(2) |cos t|, t uniform; the mean of the largest of four, by simulation.
    rng = torch.Generator().manual_seed(0)
    t = torch.rand(200_000, 4, generator=rng, dtype=torch.float64) * math.pi
    assert gaussian.expected_mu(2) == pytest.approx(
        float((2**0.5 * t.cos().abs()).amax(1).mean()), rel=0.005
    )


def test_every_group_says_what_it_is_about():
    assert all(group.title and group.claims.__doc__ for group in GROUPS.values())


@pytest.mark.parametrize("plot", [plot_equalities, plot_bounds])
def test_claims_are_pictures(plot, tmp_path):
    plot(measure(SMALL, ["lemma3", "lemma13"]), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_where_nothing_is_to_be_seen_there_is_no_picture(tmp_path):
    plot_equalities({"lemma13": [claim("<=", 1.0, predicted=2.0)]}, tmp_path / "a.png")
    plot_bounds({"range": [claim("=", 1.0, predicted=2.0)]}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
