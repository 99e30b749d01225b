"""The papers' theorems, measured on the package in float64 (QuIP, arXiv 2307.13304).

l is tr((W_hat - W) H (W_hat - W)^T). kappa is 12 for nearest and 6 for stochastic rounding: the
inverse mean square of one rounding error. D is LDLQ's diagonal; P = (F + I)^-1 = I - K. An
average over W is a mean over 20,000 rows, uniform on [0, 1], and has 1 % of sampling noise.
"""

import math
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial

import pytest
import torch
from scipy.optimize import minimize_scalar

from quip import feedback, recipe, recipes, rotation, transforms
from quip.codebooks import MinMaxGrid, RmsGrid
from quip.linalg import block_ldl
from quip.quantize import quantize_matrix
from quip.rounding import greedy, sweep
from tests import reference as ref

ROWS = 20_000
SAMPLING = 0.01
NOISE = 1e-10  # float64 rounding of sums of a few thousand terms of size about 1


@dataclass(frozen=True)
class Integers:
    """All whole numbers, unbounded as in the theorems; stochastic rounding if there is an rng."""

    rng: torch.Generator | None = None
    dim = 1
    index_bits = 64

    def fit(self, X, h):
        return self

    def seeded(self, rng):
        return replace(self, rng=rng)

    def clamp(self, X):
        return X

    def round(self, x, h):
        u = 0.5 if self.rng is None else torch.rand(x.shape, generator=self.rng, dtype=x.dtype)
        return torch.floor(x + u).long().squeeze(1)

    def decode(self, codes):
        return codes.double().unsqueeze(1)

    def joined(self, books, groups):
        raise NotImplementedError("no file holds them")


NEAREST = Integers()
ROUNDINGS = pytest.mark.parametrize("kappa", [12, 6], ids=["nearest", "stochastic"])


def stochastic(seed: int) -> Integers:
    return Integers(torch.Generator().manual_seed(seed))


def rounding(kappa: int) -> Integers:
    return NEAREST if kappa == 12 else stochastic(1)


def whole_codes(bits: int) -> MinMaxGrid:
    """The grid 0 ... 2^bits - 1 for weights in code units."""
    one = torch.ones((), dtype=torch.float64)
    return MinMaxGrid(bits=bits, step=one, zero=0 * one)


def round_all(W, K, book):
    codes, _ = sweep(W, K, torch.ones(len(K), dtype=W.dtype), book)
    return codes.double()


def measured_loss(W, H, K, book) -> float:
    return ref.trace_loss(W, round_all(W, K, book), H)


def trace_D(H) -> float:
    return float(feedback.ldl(H)[1].sum())


def spectral(H) -> tuple[float, float]:
    """(mu, tr(H^1/2)^2) of Definition 1: mu = sqrt(n) max |Q_ij|, H = Q Lambda Q^T."""
    values, Q = torch.linalg.eigh(H)
    return len(H) ** 0.5 * float(Q.abs().max()), float(values.clamp(min=0).sqrt().sum()) ** 2


def with_spectrum(values, seed: int):
    """A random H with the given eigenvalues."""
    rng = torch.Generator().manual_seed(seed)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64)).Q
    return (Q * values) @ Q.T


def any_feedback(H) -> dict[str, torch.Tensor]:
    """K of linear feedback rules that depend on H alone or on nothing."""
    rng = torch.Generator().manual_seed(2)
    noise = torch.randn(len(H), len(H), generator=rng, dtype=torch.float64).triu(1)
    F = block_ldl(H)[0]
    return {
        "none": feedback.none(H)[0],
        "coordinate": feedback.coordinate(H)[0],
        "bounded": feedback.admm(H, bound=0.3)[0],
        "half": ref.running_feedback(F / 2),
        "random": ref.running_feedback(F + 0.02 * noise),
    }


# Theorem 1, Lemma 3 and their neighbours: the unbounded grid


@ROUNDINGS
def test_theorem_1_ldlq_loses_the_trace_of_d_over_kappa_on_average(kappa):
    W, H = ref.correlated_problem(ROWS, 64)
    K, D = feedback.ldl(H)
    expected = ROWS / kappa * float(D.sum())
    assert measured_loss(W, H, K, rounding(kappa)) == pytest.approx(expected, rel=SAMPLING)


def test_theorem_1_nearest_ldlq_attains_its_worst_case():
    _, H = ref.correlated_problem(1, 64)
    K, D = feedback.ldl(H)
    P = torch.eye(64, dtype=torch.float64) - K
    # Every target is a hair above 1/2, so that rounding noise cannot turn it down: W_hat = 1.
    eta = torch.full((5, 64), 0.5 - 1e-9, dtype=torch.float64)
    W = 1 - eta @ P
    assert torch.equal(round_all(W, K, NEAREST), torch.ones_like(W))
    assert measured_loss(W, H, K, NEAREST) == pytest.approx(5 / 4 * float(D.sum()), rel=1e-8)


@ROUNDINGS
@pytest.mark.parametrize("spread", [0.0, 0.3, 30.0])
def test_theorem_1_no_weights_lose_more_than_the_worst_case(kappa, spread):
    W, H = ref.correlated_problem(1, 64)
    K, D = feedback.ldl(H)
    row = 0.5 + spread * (W - 0.5)
    bound = ROWS / 4 * float(D.sum()) * (1 + SAMPLING)
    assert measured_loss(row.repeat(ROWS, 1), H, K, rounding(kappa)) <= bound


@ROUNDINGS
@pytest.mark.parametrize("name", ["none", "coordinate", "bounded", "half", "random"])
def test_any_feedback_loses_the_trace_of_p_h_pt_and_never_less_than_ldlq(name, kappa):
    W, H = ref.correlated_problem(ROWS, 64)
    K = any_feedback(H)[name]
    P = torch.eye(64, dtype=torch.float64) - K
    trace = float(torch.trace(P @ H @ P.T))
    assert trace > trace_D(H)
    expected = ROWS / kappa * trace
    assert measured_loss(W, H, K, rounding(kappa)) == pytest.approx(expected, rel=SAMPLING)


@ROUNDINGS
def test_lemma_3_without_feedback_the_average_loss_is_the_trace_of_h(kappa):
    W, H = ref.correlated_problem(ROWS, 64)
    K, h = feedback.none(H)
    expected = ROWS / kappa * float(h.sum())
    assert measured_loss(W, H, K, rounding(kappa)) == pytest.approx(expected, rel=SAMPLING)


def test_lemma_3_stochastic_rounding_of_one_half_is_its_worst_case():
    _, H = ref.correlated_problem(1, 64)
    W = torch.full((ROWS, 64), 0.5, dtype=torch.float64)
    loss = measured_loss(W, H, feedback.none(H)[0], stochastic(3))
    # Errors are +-1/2: the spread of a quadratic form of signs, not of their size.
    assert loss == pytest.approx(ROWS / 4 * float(H.trace()), rel=2 * SAMPLING)


def test_nearest_rounding_of_one_half_everywhere_loses_the_sum_of_h():
    _, H = ref.correlated_problem(1, 64)
    W = torch.full((7, 64), 0.5, dtype=torch.float64)
    K, _ = feedback.none(H)
    assert measured_loss(W, H, K, NEAREST) == pytest.approx(7 / 4 * float(H.sum()), rel=NOISE)
    assert torch.equal(round_all(W, K, whole_codes(2)), torch.ones_like(W))  # ties go up


def test_strictness_feedback_gains_exactly_where_h_is_not_diagonal():
    pair = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    assert trace_D(pair) == pytest.approx(2 - 0.6**2, rel=NOISE)
    _, H = ref.correlated_problem(1, 64)
    assert trace_D(H) < float(H.trace())
    diagonal = H.diagonal().diag()
    assert trace_D(diagonal) == pytest.approx(float(H.trace()), rel=NOISE)
    assert bool((feedback.ldl(diagonal)[0] == 0).all())


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("n", [24, 64, 100])
def test_lemma_2_incoherence_bounds_the_trace_of_d(n, decay):
    H = with_spectrum(torch.arange(1, n + 1, dtype=torch.float64) ** -decay, seed=n)
    mu, root = spectral(H)
    assert trace_D(H) <= mu**2 / n * root


def test_corollary_low_rank_makes_ldlq_beat_plain_rounding_by_mu_squared_k_over_n():
    n, k = 256, 4
    values = torch.zeros(n, dtype=torch.float64)
    values[:k] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    H = with_spectrum(values, seed=0)
    mu = n**0.5 * float(torch.linalg.eigh(H)[1][:, -k:].abs().max())  # of the k that matter
    assert mu**2 * k < n
    H = H + 1e-8 * torch.eye(n, dtype=torch.float64)  # what a Cholesky factor needs
    assert trace_D(H) <= mu**2 * k / n * float(H.trace())


@pytest.mark.parametrize("decay", [0.5, 2.0])
def test_theorem_4_of_one_spectrum_diagonal_h_is_the_worst(decay):
    values = torch.arange(1, 41, dtype=torch.float64) ** -decay
    total = float(values.sum())
    assert trace_D(values.diag()) == pytest.approx(total, rel=NOISE)
    assert max(trace_D(with_spectrum(values, seed)) for seed in range(5)) < total


# Algorithm 5: bounded feedback


@pytest.mark.parametrize("c", [0.05, 0.3, 1.0, 5.0])
def test_lemma_11_bounded_feedback_keeps_its_bound_and_its_trace(c):
    _, H = ref.correlated_problem(1, 64)
    L = torch.eye(64, dtype=torch.float64) - feedback.admm(H, bound=c)[0]
    assert float(L.square().sum(0).max()) <= 1 + c + NOISE
    mu, root = spectral(H)
    assert float(torch.trace(L @ H @ L.T)) <= mu**2 / (64 * min(1, c)) * root


def test_bounded_feedback_minimises_like_the_oracle():
    _, H = ref.correlated_problem(1, 40)
    for c in (0.05, 1.0):
        L, best = torch.eye(40, dtype=torch.float64) - feedback.admm(H, bound=c)[0], ref.admm(H, c)
        # The package stops where nothing moves by more than 1e-4.
        assert float(torch.trace(L @ H @ L.T)) == pytest.approx(
            float(torch.trace(best @ H @ best.T)), rel=1e-3
        )


@pytest.mark.parametrize("rule", [feedback.ldl, partial(feedback.admm, bound=0.5)])
@pytest.mark.parametrize("delta", [0.5, 0.1, 0.01])
def test_lemma_12_the_error_along_any_direction_is_subgaussian(rule, delta):
    W, H = ref.correlated_problem(1, 64)
    K, _ = rule(H)
    L = torch.eye(64, dtype=torch.float64) - K
    rows = W.repeat(ROWS, 1)
    E = round_all(rows, K, stochastic(4)) - rows
    directions = torch.linalg.eigh(H)[1]
    threshold = (L @ directions).norm(dim=0) * math.sqrt(math.log(2 / delta) / 2)
    assert float((E @ directions).abs().ge(threshold).double().mean(0).max()) <= delta


def test_lemma_13_weights_inside_the_grid_overflow_in_none_of_fifty_runs():
    runs, m, n, bits, delta = 50, 16, 32, 4, 0.1
    W, H = ref.correlated_problem(runs * m, n)
    W = 1 + (2**bits - 3) * W  # 1 <= w <= 2^b - 2
    log = math.log(4 * m * n / delta)
    K, _ = feedback.admm(H, bound=2 / log)
    codes = round_all(W, K, stochastic(5))
    assert float(codes.min()) >= 0
    assert float(codes.max()) <= 2**bits - 1
    E = codes - W
    losses = ((E @ H) * E).reshape(runs, -1).sum(1)
    mu, root = spectral(H)
    assert float(losses.max()) <= mu**2 * m / (4 * n) * root * log**2


# Theorem 6, invariance, and the algorithms as printed


def test_theorem_6_optq_and_ldlq_in_its_order_give_identical_codes():
    W, H = ref.correlated_problem(1000, 1000)
    K, _ = feedback.ldl(H)
    assert torch.equal(round_all(W, K, NEAREST), ref.optq(W, H, lambda _: ref.nearest))


@pytest.mark.parametrize("group", [8, 7])
def test_optq_refits_each_group_on_its_running_weights(group):
    W, H = ref.correlated_problem(12, 40)
    W = W - 0.4
    expected = ref.optq(W, H, lambda X: ref.minmax_rounding(X, 3), group=group)
    K, h = feedback.ldl(H)
    codes, books = sweep(W, K, h, MinMaxGrid(bits=3, step_dtype=torch.float64), group=group)
    ours = [books[k // group].decode(c) for k, c in enumerate(codes.T)]
    torch.testing.assert_close(torch.cat(ours, dim=1), expected, rtol=0, atol=NOISE)


@pytest.mark.parametrize("draw", recipes.EXTRAS.values(), ids=recipes.EXTRAS.keys())
def test_rescaling_and_rotation_keep_the_loss_and_are_undone(draw):
    W, H = ref.correlated_problem(24, 60)
    rng = torch.Generator().manual_seed(6)
    T, X, G = transforms.Chain.draw([transforms.Rescale.draw, draw], W, H, rng)
    assert float(((X @ G) * X).sum()) == pytest.approx(float(((W @ H) * W).sum()), rel=NOISE)
    torch.testing.assert_close(T.undo(X), W, rtol=0, atol=NOISE)


@pytest.fixture
def exact_storage(monkeypatch):
    """Rescalings as drawn, not rounded to what a file would hold."""
    monkeypatch.setattr("quip.transforms.rescale.STORED", torch.float64)


ORDERS = pytest.mark.parametrize(
    ("order", "oracle_order"),
    [
        (recipe.natural, ref.natural),
        (recipe.backwards, ref.backwards),
        (recipe.largest_first, ref.largest_first),
    ],
)


def incoherent(order, bits: int, rho: float, **fields) -> recipe.Recipe:
    return recipe.Recipe(
        codebook=RmsGrid(bits=bits, rhos=(rho,), step_dtype=torch.float64),
        transforms=(transforms.Rescale.draw, transforms.Kronecker.draw),
        order=order,
        **fields,
    )


def rotations(q) -> tuple[torch.Tensor, torch.Tensor]:
    """R_out and R_in of a quantized matrix, dense."""
    kronecker = q.transform.links[1]
    sides = (kronecker.R_out, q.codes.shape[0]), (kronecker.R_in, q.codes.shape[1])
    return tuple(R.rotate(torch.eye(n, dtype=torch.float64)).T for R, n in sides)


@ORDERS
@pytest.mark.usefixtures("exact_storage")
def test_the_faithful_recipe_is_algorithm_3(order, oracle_order):
    W, H = ref.correlated_problem(20, 36)
    q = quantize_matrix(
        W - 0.5,
        H,
        incoherent(order, 2, 1.2, clamp_target=True, damp=0.05),  # a range that clips often
        rng=torch.Generator().manual_seed(7),
    )
    expected = ref.quip_faithful(W - 0.5, H, 2, 1.2, 0.05, *rotations(q), oracle_order)
    # dequantize returns float32.
    torch.testing.assert_close(q.dequantize().double(), expected, rtol=1e-6, atol=1e-6)


@ORDERS
@pytest.mark.parametrize("group", [None, 1, 9])
@pytest.mark.usefixtures("exact_storage")
def test_a_range_fitted_during_the_sweep_sees_the_running_weights(order, oracle_order, group):
    if group == 9:  # whole groups change places: where to, only the package says

        def oracle_order(H):
            return order(H, 1, group)

    W, H = ref.correlated_problem(20, 36)
    q = quantize_matrix(
        W - 0.5,
        H,
        incoherent(order, 2, 1.6, group=group, damp=0.05),
        rng=torch.Generator().manual_seed(8),
    )
    expected = ref.quip_running(W - 0.5, H, 2, 1.6, 0.05, *rotations(q), oracle_order, group)
    torch.testing.assert_close(q.dequantize().double(), expected, rtol=1e-6, atol=1e-6)


def test_greedy_passes_are_algorithm_4_and_never_raise_the_loss():
    W, H = ref.correlated_problem(12, 150)  # more columns than one panel
    W, book = 3 * W, whole_codes(2)
    K, h = feedback.ldl(H)
    codes, books = sweep(W, K, h, book)
    losses = [ref.trace_loss(W, codes.double(), H)]
    for _ in range(5):
        expected = ref.greedy_by_masks(W, codes.double(), H, 2)
        codes = greedy(W, H, codes, books, passes=1)
        assert torch.equal(codes.double(), expected)
        losses.append(ref.trace_loss(W, codes.double(), H))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_one_sweep_of_coordinate_feedback_is_the_first_stand_alone_greedy_pass():
    W, H = ref.correlated_problem(12, 40)
    codes = round_all(3 * W, feedback.coordinate(H)[0], whole_codes(2))
    assert torch.equal(codes, ref.greedy(3 * W, 3 * W, H, 2, 1, ref.natural(H)))


# Finite grids and rotations: the papers' numbers


def printed(number: str) -> float:
    """A number of a table, to within half a unit of its last digit."""
    half_unit = 0.5 * 10.0 ** int(Decimal(number).as_tuple().exponent)
    return pytest.approx(float(number), abs=half_unit)


@pytest.mark.parametrize(
    ("n", "clamped", "unclamped", "near", "from_the_end", "trace_ratio"),
    [
        (16, "634.0", "58.95", "59.85", "59.81", "0.5161"),
        (64, "14642", "247.1", "251.1", "251.07", "0.5039"),
        (256, "254996", "999.9", "1016.1", "1016.01", "0.5010"),
        (1024, "4.1655e6", "4010.9", "4076.1", "4076.04", "0.5002"),
    ],
)
def test_clamping_in_optq_order_breaks_ldlq_on_the_counterexample(
    n, clamped, unclamped, near, from_the_end, trace_ratio
):
    W, H = ref.counterexample(n)
    K, D = feedback.ldl(H)
    p = recipe.backwards(H, 1, None)
    K_backwards, _ = feedback.ldl(H[p][:, p])
    assert measured_loss(W, H, K, whole_codes(4)) == printed(clamped)
    assert measured_loss(W, H, K, NEAREST) == printed(unclamped)
    assert measured_loss(W, H, feedback.none(H)[0], whole_codes(4)) == printed(near)
    backwards = measured_loss(W[:, p], H[p][:, p], K_backwards, whole_codes(4))
    assert backwards == printed(from_the_end)
    assert float(D.sum() / H.trace()) == printed(trace_ratio)
    if n <= 256:
        assert measured_loss(W, H, K, whole_codes(2)) == printed(clamped)


@pytest.mark.parametrize(
    ("bits", "best_rho", "best", "at_the_papers_rho"),
    [
        (2, "1.494", "0.1188", "0.2146"),
        (3, "2.051", "0.0374", "0.0419"),
        (4, "2.514", "0.0115", "0.0117"),
    ],
)
def test_the_best_range_for_gaussian_weights(bits, best_rho, best, at_the_papers_rho):
    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    top = 2**bits - 1

    def error(rho: float) -> float:
        step = torch.tensor(2 * rho / top, dtype=torch.float64)
        book = RmsGrid(bits=bits, rhos=(rho,), step=step, zero=torch.full_like(step, top / 2))
        codes = book.round(x.unsqueeze(1), torch.ones(1, dtype=torch.float64))
        return float(((book.decode(codes).squeeze(1) - x) ** 2 * density).sum())

    found = minimize_scalar(error, bounds=(1, 4), method="bounded", options={"xatol": 1e-5})
    assert found.x == printed(best_rho)
    assert found.fun == printed(best)
    assert error(2.4) == printed(at_the_papers_rho)


@pytest.mark.parametrize(("n", "incoherence"), [(256, 7.5), (1024, 10.4), (2304, 12.6)])
def test_kronecker_rotations_make_a_diagonal_h_as_incoherent_as_published(n, incoherence):
    eye = torch.eye(n, dtype=torch.float64)
    draws = []
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        R = rotation.Rotation.draw(n, rng, blocked=False, mix=True, shuffle=True)
        draws.append(n**0.5 * float(R.rotate(eye).abs().max()))
    # The largest of n^2 entries varies by about a tenth from draw to draw.
    assert sum(draws) / 4 == pytest.approx(incoherence, rel=0.15)


@pytest.mark.parametrize(("n", "incoherence"), [(256, 4.1), (1024, 4.8)])
def test_a_full_haar_rotation_is_more_incoherent_than_a_kronecker_one(n, incoherence):
    R = rotation.Haar.draw(n, torch.Generator().manual_seed(0)).matrices[0]
    assert n**0.5 * float(R.abs().max()) == pytest.approx(incoherence, rel=0.15)
