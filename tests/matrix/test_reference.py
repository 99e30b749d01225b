"""The oracles of tests/reference.py agree with one another, so that one slip cannot hide in two."""

import itertools

import pytest
import torch

from tests import reference as ref

ORDERS = [ref.natural, ref.backwards, ref.largest_first]
# Rounding noise of sums of at most 1000 float64 terms of size about 1, with two digits to spare.
NOISE = 1e-10


def haar(n: int, *, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64)).Q


def codes_of_two_bits(t: torch.Tensor) -> torch.Tensor:
    return ref.nearest(t, 2)


def test_nearest_sends_ties_up_and_stays_on_the_codes():
    t = torch.tensor([-0.5, 0.49, 0.5, 1.5, 2.5, 9.0], dtype=torch.float64)
    assert ref.nearest(t).tolist() == [0, 0, 1, 2, 3, 9]
    assert ref.nearest(t, 2).tolist() == [0, 0, 1, 2, 3, 3]


def test_stochastic_rounding_is_unbiased():
    t = torch.full((100_000,), 0.3, dtype=torch.float64)
    q = ref.stochastic(t, torch.Generator().manual_seed(0))
    assert set(q.tolist()) == {0.0, 1.0}
    assert abs(float(q.mean()) - 0.3) < 0.006  # four standard errors of 0.0014


def test_ldl_by_flips_equals_elimination_from_the_last_column():
    _, H = ref.correlated_problem(1, 30)
    F, D = ref.ldl(H)
    S = H.clone()
    for k in reversed(range(30)):  # the Schur complement of what the later columns explain
        assert float(D[k]) == pytest.approx(float(S[k, k]), rel=NOISE)
        torch.testing.assert_close(F[:k, k], S[:k, k] / S[k, k], rtol=0, atol=NOISE)
        S = S - torch.outer(S[:, k], S[:, k]) / S[k, k]
    assert bool((F.tril() == 0).all())


def test_last_to_first_needs_only_the_lower_cholesky_factor():
    W, H = ref.correlated_problem(5, 23)
    C = torch.linalg.cholesky(H)
    F = C / C.diagonal() - torch.eye(23, dtype=torch.float64)  # strictly lower
    W_hat = 3 * W
    for k in reversed(range(23)):
        W_hat[:, k] = ref.nearest(3 * W[:, k] + (3 * W - W_hat) @ F[:, k], 2)
    assert torch.equal(ref.ldlq(3 * W, H, codes_of_two_bits, ref.backwards(H)), W_hat)


def test_optq_by_inverse_cholesky_equals_ldlq_in_natural_order():
    W, H = ref.correlated_problem(1000, 1000)  # Theorem 6, at the paper's size
    ours = ref.ldlq(W, H, ref.nearest, ref.natural(H))
    assert torch.equal(ref.optq(W, H, lambda _: ref.nearest), ours)


@pytest.mark.parametrize("order", ORDERS)
def test_errors_of_running_weights_feed_back_to_the_same_codes(order):
    W, H = ref.correlated_problem(7, 40)
    p = order(H)
    F, _ = ref.ldl(H[p][:, p])
    running = ref.round_running(3 * W[:, p], ref.running_feedback(F), codes_of_two_bits)
    assert torch.equal(running[:, p.argsort()], ref.ldlq(3 * W, H, codes_of_two_bits, p))


@pytest.mark.parametrize("Q", [ref.nearest, codes_of_two_bits], ids=["unbounded", "clamped"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_loss_is_the_sum_of_scalar_errors_weighed_by_d(order, Q):
    W, H = ref.correlated_problem(6, 33)
    p = order(H)
    W_hat = ref.ldlq(3 * W, H, Q, p)
    F, D = ref.ldl(H[p][:, p])
    eta = (W_hat - 3 * W)[:, p] @ (F + torch.eye(33, dtype=torch.float64))
    assert ref.trace_loss(3 * W, W_hat, H) == pytest.approx(float((eta**2 @ D).sum()), rel=NOISE)


def test_one_group_of_all_columns_is_no_group():
    W, H = ref.correlated_problem(6, 20)

    def fit(X):
        return ref.minmax_rounding(X - 0.3, 3)

    assert torch.equal(ref.optq(W, H, fit, group=20), ref.optq(W, H, fit))


def test_grouped_grids_are_fitted_on_compensated_weights():
    W, H = ref.correlated_problem(6, 20)
    seen = []

    def fit(X):
        seen.append(X)
        return ref.rms_rounding(X, 2, 1.5)

    ref.optq(W, H, fit, group=8)
    on_all, first, second, last = seen
    assert torch.equal(on_all, W)
    assert torch.equal(first, W[:, :8])
    assert second.shape == (6, 8)
    assert not torch.allclose(second, W[:, 8:16])
    assert last.shape == (6, 4)


def test_the_row_grid_holds_zero_and_misses_no_weight_by_more_than_a_step():
    W = ref.correlated_problem(9, 50)[0] * 3 - torch.linspace(0, 3, 9, dtype=torch.float64)[:, None]
    step, zero = ref.minmax_grid(W, 3)
    W_hat = torch.stack([ref.minmax_rounding(W, 3)(w) for w in W.T], dim=1)
    assert bool(((zero >= 0) & (zero <= 7) & (zero == zero.round())).all())
    # Half a step from rounding w, and half a step more at the ends, from rounding zero.
    assert bool(((W - W_hat).abs() <= step[:, None] * (1 + NOISE)).all())
    assert bool((ref.minmax_rounding(W, 3)(torch.zeros(9, dtype=torch.float64)) == 0).all())


def test_nothing_to_feed_back_makes_the_baseline_row_grid_rounding():
    W, _ = ref.correlated_problem(4, 12)
    H = torch.linspace(1, 2, 12, dtype=torch.float64).diag()
    nearest = torch.stack([ref.minmax_rounding(W, 2)(w) for w in W.T], dim=1)
    baseline = ref.ldlq_baseline(W, H, 2, 0.01, ref.backwards(H))
    torch.testing.assert_close(baseline, nearest, rtol=0, atol=NOISE)


def test_postprocessing_inverts_preprocessing_and_the_loss_is_kept():
    W, H = ref.correlated_problem(12, 20)
    R_out, R_in = haar(12), haar(20)
    X, H_processed, r = ref.preprocess(W, H, 0.05, R_out, R_in)
    torch.testing.assert_close(ref.postprocess(X, r, R_out, R_in), W, rtol=0, atol=NOISE)
    noise = 0.1 * haar(20)[:12]
    W_hat = ref.postprocess(X + noise, r, R_out, R_in)
    processed = ref.trace_loss(X, X + noise, H_processed)
    assert ref.trace_loss(W, W_hat, ref.damp(H, 0.05)) == pytest.approx(processed, rel=NOISE)


@pytest.mark.parametrize("order", ORDERS)
def test_where_nothing_clips_the_clamped_target_changes_nothing(order):
    W, H = ref.correlated_problem(12, 20)
    arguments = (W, H, 4, 8.0, 0.01, haar(12), haar(20), order)  # a range of 8 RMS holds all
    faithful, running = ref.quip_faithful(*arguments), ref.quip_running(*arguments)
    torch.testing.assert_close(faithful, running, rtol=0, atol=NOISE)


def test_where_weights_clip_feeding_the_clip_error_back_lowers_the_loss():
    W, H = ref.correlated_problem(48, 64)
    arguments = (W - 0.5, H, 2, 1.2, 0.01, haar(48), haar(64))
    faithful = ref.proxy_loss(W - 0.5, ref.quip_faithful(*arguments), H)
    assert ref.proxy_loss(W - 0.5, ref.quip_running(*arguments), H) < faithful


def test_the_incremental_greedy_pass_equals_the_masked_form():
    W, H = ref.correlated_problem(9, 31)
    start = ref.ldlq(3 * W, H, codes_of_two_bits, ref.backwards(H))
    for guess in (start, 3 * W):
        ours = ref.greedy(3 * W, guess, H, 2, 1, ref.natural(H))
        assert torch.equal(ours, ref.greedy_by_masks(3 * W, guess, H, 2))


@pytest.mark.parametrize("order", ORDERS)
def test_greedy_never_raises_the_loss_and_ends_at_a_coordinate_minimum(order):
    W, H = ref.correlated_problem(9, 31)
    p = order(H)
    W_hat = ref.ldlq(3 * W, H, codes_of_two_bits, p)
    losses = [ref.trace_loss(3 * W, W_hat, H)]
    for _ in range(6):
        W_hat = ref.greedy(3 * W, W_hat, H, 2, 1, p)
        losses.append(ref.trace_loss(3 * W, W_hat, H))
    assert all(after <= before + NOISE for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    settled = ref.greedy(3 * W, W_hat, H, 2, 40, p)
    for k, code in itertools.product(range(31), range(4)):
        moved = settled.clone()
        moved[0, k] = code
        assert ref.trace_loss(3 * W, moved, H) >= ref.trace_loss(3 * W, settled, H) - NOISE


def test_bounded_feedback_without_a_bound_is_ldlq():
    _, H = ref.correlated_problem(1, 24)
    L = ref.admm(H, 1e9, iterations=4000)
    F, D = ref.ldl(H)
    inverse = torch.linalg.inv(L) - torch.eye(24, dtype=torch.float64)
    # Not the optimum but ADMM's approach to it, which is linear at a rate set by cond(H).
    torch.testing.assert_close(inverse, F, rtol=0, atol=1e-6)
    assert float(torch.trace(L @ H @ L.T)) == pytest.approx(float(D.sum()), rel=1e-6)


@pytest.mark.parametrize("c", [0.05, 0.5, 5.0])
def test_bounded_feedback_respects_its_bound_and_no_feasible_neighbour_is_better(c):
    _, H = ref.correlated_problem(1, 24)
    L = ref.admm(H, c, iterations=4000)
    assert float((L**2).sum(0).max()) <= 1 + c + NOISE
    best = float(torch.trace(L @ H @ L.T))
    rng = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 0.1):
        step = size * torch.randn(24, 24, generator=rng, dtype=torch.float64).triu(1)
        Z = L.triu(1) + step
        Z = Z * torch.clamp((c**0.5) / Z.norm(dim=0), max=1)
        other = Z + torch.eye(24, dtype=torch.float64)
        assert float(torch.trace(other @ H @ other.T)) > best


def test_bounded_feedback_with_a_bound_of_nothing_is_plain_rounding():
    W, H = ref.correlated_problem(9, 24)
    assert torch.equal(ref.round_bounded(W, H, 1e-16, ref.nearest), (W + 0.5).floor())


@pytest.mark.parametrize("d", [1, 4, 8])
def test_block_ldl_rebuilds_h_from_unit_blocks(d):
    _, H = ref.correlated_problem(1, 24)
    F, D = ref.block_ldl(H, d)
    unit = F + torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(unit @ torch.block_diag(*D) @ unit.T, H, rtol=0, atol=NOISE)
    column = torch.arange(24) // d
    torch.testing.assert_close(F * (column[:, None] >= column), 0 * F, rtol=0, atol=NOISE)


def test_block_ldlq_of_single_columns_is_ldlq():
    W, H = ref.correlated_problem(9, 24)
    ours = ref.block_ldlq(3 * W, H, 1, lambda T, _: ref.nearest(T, 2))
    assert torch.equal(ours, ref.ldlq(3 * W, H, codes_of_two_bits, ref.natural(H)))


def test_the_block_loss_is_the_sum_of_block_errors_in_their_metrics():
    W, H = ref.correlated_problem(9, 24)
    F, D = ref.block_ldl(H, 4)
    W_hat = ref.block_ldlq(3 * W, H, 4, lambda T, _: ref.nearest(T, 2))
    eta = ((W_hat - 3 * W) @ (F + torch.eye(24, dtype=torch.float64))).reshape(9, 6, 4)
    loss = float(torch.einsum("mki,kij,mkj->", eta, D, eta))
    assert ref.trace_loss(3 * W, W_hat, H) == pytest.approx(loss, rel=NOISE)


def test_a_kronecker_rotation_multiplies_both_sides_of_the_reshaped_vector():
    A, B = haar(3), haar(5)
    x = torch.arange(15, dtype=torch.float64)
    expected = (A @ x.reshape(3, 5) @ B.T).flatten()
    torch.testing.assert_close(ref.kronecker(A, B) @ x, expected, rtol=0, atol=NOISE)


@pytest.mark.parametrize(
    ("n", "clamped", "unclamped", "near", "from_the_end"),
    [(16, 634.0, 58.95, 59.85, 59.81), (64, 14642, 247.1, 251.1, 251.07)],
)
def test_the_oracles_reproduce_the_counterexample(n, clamped, unclamped, near, from_the_end):
    W, H = ref.counterexample(n)
    losses = [
        ref.trace_loss(W, ref.ldlq(W, H, codes_of_two_bits, ref.natural(H)), H),
        ref.trace_loss(W, ref.ldlq(W, H, ref.nearest, ref.natural(H)), H),
        ref.trace_loss(W, ref.nearest(W), H),
        ref.trace_loss(W, ref.ldlq(W, H, codes_of_two_bits, ref.backwards(H)), H),
    ]
    # Half a unit of the fourth digit.
    assert losses == pytest.approx([clamped, unclamped, near, from_the_end], rel=2.5e-4)
