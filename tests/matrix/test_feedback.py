from functools import partial

import pytest
import torch

from quip.errors import NotPositiveDefinite
from quip.matrix import feedback
from tests import reference as ref
from tests.laws import assert_near

DIMS = pytest.mark.parametrize("dim", [1, 2, 8])
RULES = [feedback.none, feedback.ldl, feedback.coordinate, feedback.admm]
to_the_end = partial(feedback.admm, tolerance=0.0)


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


def earlier(n: int, dim: int) -> torch.Tensor:
    """Whether block row i comes before block column j."""
    block = torch.arange(n) // dim
    return block[:, None] < block


@pytest.mark.parametrize("rule", RULES)
def test_feedback_is_strictly_upper_double_and_from_h_alone(problem, rule):
    _, H = problem(1, 24)
    before = H.clone()
    K, h = rule(H)
    assert K.dtype == h.dtype == torch.float64
    assert bool((K.tril() == 0).all())
    assert bool((h > 0).all())
    assert torch.equal(H, before)


@pytest.mark.parametrize("rule", RULES)
def test_feedback_does_not_depend_on_the_scale_of_h(problem, rule):
    _, H = problem(1, 24)
    assert_near(rule(1024 * H)[0], rule(H)[0])


@pytest.mark.parametrize("rule", RULES)
def test_independent_inputs_feed_nothing_back(rule):
    H = torch.linspace(0.1, 3, 12, dtype=torch.float64).diag()
    assert bool((rule(H)[0] == 0).all())


def test_no_feedback_is_none(problem):
    _, H = problem(1, 12)
    K, h = feedback.none(H)
    assert bool((K == 0).all())
    assert torch.equal(h, H.diagonal())


@DIMS
def test_ldl_is_the_papers_factor_in_running_form(problem, dim):
    _, H = problem(1, 24)
    K, h = feedback.ldl(H, dim)
    F, D = ref.block_ldl(H, dim)
    assert_near(K, ref.running_feedback(F))
    assert_near(h, D.diagonal(dim1=1, dim2=2).flatten())
    assert bool((K[~earlier(24, dim)] == 0).all())


@DIMS
def test_ldl_makes_errors_of_different_columns_independent(problem, dim):
    _, H = problem(1, 24)
    K, h = feedback.ldl(H, dim)
    D = (eye(24) - K) @ H @ (eye(24) - K).T
    assert_near(D.diagonal(), h)
    assert_near(D[earlier(24, dim)], torch.zeros(int(earlier(24, dim).sum())).double(), 1e-9)


@DIMS
def test_coordinate_feedback_is_the_masked_h_over_its_diagonal(problem, dim):
    _, H = problem(1, 24)
    K, h = feedback.coordinate(H, dim)
    same = torch.arange(24)[:, None] // dim == torch.arange(24) // dim
    F = H @ torch.linalg.inv(H * same) * earlier(24, dim)
    assert_near(K, ref.running_feedback(F), 1e-9)  # F is ill-conditioned: a pseudo-inverse apart
    assert torch.equal(h, H.diagonal())


def test_coordinate_feedback_needs_no_positive_definite_h(problem):
    _, H = problem(1, 24, rank=3, dead=(4,))
    K, _ = feedback.coordinate(H)
    assert bool(torch.isfinite(K).all())
    assert bool((K[4] == 0).all())
    assert bool((K[:, 4] == 0).all())


def test_ldl_refuses_a_singular_h(problem):
    _, H = problem(1, 24, dead=(4,))
    with pytest.raises(NotPositiveDefinite, match="the smallest eigenvalue is"):
        feedback.ldl(H)


@pytest.mark.parametrize("bound", [0.05, 1.0, 20.0])
def test_admm_run_to_the_end_is_the_oracle(problem, bound):
    _, H = problem(1, 24)
    K, h = to_the_end(H, bound=bound)
    assert_near(eye(24) - K, ref.admm(H, bound))
    assert_near(h, H.diagonal() / H.diagonal().max())


@pytest.mark.parametrize("bound", [0.05, 1.0, 20.0])
def test_admm_stopped_early_keeps_its_bound_and_nearly_its_optimum(problem, bound):
    _, H = problem(1, 24)
    L = eye(24) - feedback.admm(H, bound=bound)[0]
    best = ref.admm(H, bound)
    assert float(L.square().sum(0).max()) <= 1 + bound + 1e-12
    loss, least = (float(torch.trace(X @ H @ X.T)) for X in (L, best))
    # Both are approximations of one optimum: a share of 1e-4 of L moves the loss by as much.
    assert loss == pytest.approx(least, rel=1e-3)


def test_admm_takes_a_rank_deficient_h(problem):
    _, H = problem(1, 24, rank=3, dead=(4,))
    K, _ = feedback.admm(H)
    assert bool(torch.isfinite(K).all())
    assert bool((K[:, 4] == 0).all())


def test_admm_with_no_room_is_no_feedback_and_with_all_room_is_ldl(problem):
    _, H = problem(1, 12)
    H = H / H.diagonal() ** 0.5 / H.diagonal()[:, None] ** 0.5 + eye(12)  # well-conditioned
    none, _ = feedback.admm(H, bound=1e-16)
    # ADMM approaches its optimum linearly; this many steps bring it to single precision.
    everything, _ = to_the_end(H, bound=1e9, iterations=3000)
    assert_near(none, torch.zeros_like(H), 1e-7)  # columns of norm sqrt(bound) at most
    assert_near(everything, feedback.ldl(H)[0], 1e-6)


def test_admm_is_defined_for_single_columns_only(problem):
    with pytest.raises(ValueError, match="not blocks of 8"):
        feedback.admm(problem(1, 24)[1], 8)
