"""The papers' algorithms as printed, against the oracles, in float64 (QuIP, arXiv 2307.13304)."""

import pytest
import torch

from quip import transforms
from quip.codebooks import MinMaxGrid, RmsGrid
from quip.matrix import feedback, recipe
from quip.matrix.order import backwards, largest_first, natural
from quip.matrix.polish import greedy
from quip.matrix.quantize import quantize_matrix
from quip.matrix.sweep import sweep
from quip.research.theory.integers import grid, round_weights
from tests import reference as ref

NOISE = 1e-10  # float64 rounding of sums of a few thousand terms of size about 1


@pytest.mark.parametrize("group", [8, 7])
def test_optq_refits_each_group_on_its_running_weights(group):
    W, H = ref.correlated_problem(12, 40)
    W = W - 0.4
    expected = ref.optq(W, H, lambda X: ref.minmax_rounding(X, 3), group=group)
    K, h = feedback.ldl(H)
    codes, books = sweep(W, K, h, MinMaxGrid(bits=3, step_dtype=torch.float64), group=group)
    ours = [books[k // group].decode(c) for k, c in enumerate(codes.T)]
    torch.testing.assert_close(torch.cat(ours, dim=1), expected, rtol=0, atol=NOISE)


@pytest.mark.parametrize(
    "draw",
    [
        transforms.KroneckerDraw(blocked=True),
        transforms.KroneckerDraw(),
        transforms.KroneckerDraw(blocked=True, permute=False),
    ],
    ids=["0", "1", "2"],
)
def test_rescaling_and_rotation_keep_the_loss_and_are_undone(draw):
    W, H = ref.correlated_problem(24, 60)
    rng = torch.Generator().manual_seed(6)
    T, X, G = transforms.Chain.draw([transforms.RescaleDraw(), draw], W, H, rng)
    assert float(((X @ G) * X).sum()) == pytest.approx(float(((W @ H) * W).sum()), rel=NOISE)
    torch.testing.assert_close(T.undo(X), W, rtol=0, atol=NOISE)


@pytest.fixture
def exact_storage(monkeypatch):
    """Rescalings as drawn, not rounded to what a file would hold."""
    monkeypatch.setattr("quip.transforms.rescale.FILE_DTYPE", torch.float64)


ORDERS = pytest.mark.parametrize(
    ("order", "oracle_order"),
    [
        (natural, ref.natural),
        (backwards, ref.backwards),
        (largest_first, ref.largest_first),
    ],
)


def incoherent(order, bits: int, rho: float, **fields) -> recipe.Recipe:
    return recipe.Recipe(
        codebook=RmsGrid(bits=bits, rhos=(rho,), step_dtype=torch.float64),
        transforms=(transforms.RescaleDraw(), transforms.KroneckerDraw()),
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
    W, book = 3 * W, grid(2)
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
    codes = round_weights(3 * W, feedback.coordinate(H)[0], grid(2))
    assert torch.equal(codes, ref.greedy(3 * W, 3 * W, H, 2, 1, ref.natural(H)))


def test_bounded_feedback_minimises_like_the_oracle():
    _, H = ref.correlated_problem(1, 40)
    for c in (0.05, 1.0):
        L, best = torch.eye(40, dtype=torch.float64) - feedback.admm(H, bound=c)[0], ref.admm(H, c)
        # The package stops where nothing moves by more than 1e-4.
        assert float(torch.trace(L @ H @ L.T)) == pytest.approx(
            float(torch.trace(best @ H @ best.T)), rel=1e-3
        )
