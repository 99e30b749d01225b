"""W* makes up for wrong inputs: it is the least of the asymmetric loss, and nothing without any."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quip.matrix.target import Lack, best_share, shifts, targets
from tests import reference, reference_target

M, N = 7, 12


def problem(seed: int, tokens: int = 400, noise: float = 0.4) -> tuple[Tensor, ...]:
    """W, the inputs of the original, those of the quantized model, and residual errors."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(N, N, generator=rng, dtype=torch.float64)
    W = torch.randn(M, N, generator=rng, dtype=torch.float64)
    originals = torch.randn(tokens, N, generator=rng, dtype=torch.float64) @ mix
    wrong = torch.randn(N, N, generator=rng, dtype=torch.float64) * noise
    inputs = originals + originals @ wrong
    residuals = inputs @ torch.randn(N, M, generator=rng, dtype=torch.float64) * noise
    residuals += torch.randn(tokens, M, generator=rng, dtype=torch.float64)
    return W, originals, inputs, residuals


def lack(W: Tensor, originals: Tensor, inputs: Tensor, residuals: Tensor) -> Lack:
    tokens = len(inputs)
    e = (originals - inputs) @ W.T + residuals
    return Lack(H=inputs.T @ inputs / tokens, C={"a": e.T @ inputs / tokens}, count=tokens)


@given(seed=st.integers(0, 999), damp=st.sampled_from([0.0, 0.01, 1.0]))
@settings(max_examples=20, deadline=None)
def test_the_target_is_that_of_the_formula(seed, damp):
    W, *seen = problem(seed)
    known = lack(W, *seen)
    lam = damp * float(known.H.diagonal().mean())
    expected = reference_target.target(W, *seen, lam)
    found, share = targets({"a": W}, known, damp, 1.0)["a"]
    # H of mixed inputs has a condition number of up to 1e6 or so.
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert share == 1
    half, _ = targets({"a": W}, known, damp, 0.5)["a"]
    torch.testing.assert_close(half, (W + expected) / 2, rtol=1e-7, atol=1e-7)


def test_inputs_that_are_right_leave_the_weights():
    W, originals, _, residuals = problem(0)
    known = lack(W, originals, originals, 0 * residuals)
    found, _ = targets({"a": W}, known, 0.01, 1.0)["a"]
    assert (found - W).abs().max() <= 1e-10


def test_the_loss_of_any_weights_is_their_distance_from_the_target_and_a_constant():
    W, *seen = problem(1)
    known = lack(W, *seen)
    best, _ = targets({"a": W}, known, 0.0, 1.0)["a"]
    constants = []
    for seed in (2, 3):
        other = problem(seed)[0]
        loss = reference_target.asymmetric_loss(other, W, *seen)
        constants.append(loss - reference.trace_loss(best, other, known.H))
    assert constants[0] == pytest.approx(constants[1], rel=1e-9)
    assert constants[0] == pytest.approx(reference_target.asymmetric_loss(best, W, *seen))


@pytest.mark.parametrize("seed", range(6))
def test_the_share_is_the_best_on_tokens_that_were_held_out(seed):
    W, *seen = problem(seed, tokens=40)
    fitted, held = [x[:25] for x in seen], [x[25:] for x in seen]
    known, apart = lack(W, *seen), lack(W, *held)
    found, share = targets({"a": W}, known, 0.01, apart)["a"]
    shift = shifts(lack(W, *fitted), 0.01, ["a"])["a"]
    expected = reference_target.best_share(shift, W, *held)
    assert float(share) == pytest.approx(expected, abs=1e-4)  # the oracle tries 10,000
    whole = shifts(known, 0.01, ["a"])["a"]
    torch.testing.assert_close(found, W + float(share) * whole)


def test_a_share_is_never_below_0_or_above_1():
    shift, H = torch.ones(2, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    assert [float(best_share(shift, k * shift, H)) for k in (-1, 0.25, 2)] == [0, 0.25, 1]
    assert float(best_share(0 * shift, shift, H)) == 0


def test_what_is_not_of_a_part_is_of_the_rest():
    W, *seen = problem(4)
    rest = lack(W, *seen).without(lack(W, *(x[:100] for x in seen)))
    expected = lack(W, *(x[100:] for x in seen))
    assert rest.count == expected.count
    torch.testing.assert_close(rest.H, expected.H)
    torch.testing.assert_close(rest.C["a"], expected.C["a"])


def test_an_input_that_is_always_zero_changes_nothing_and_needs_no_damping_of_ours():
    W, originals, inputs, residuals = problem(5)
    inputs[:, 3] = 0
    found, _ = targets({"a": W}, lack(W, originals, inputs, residuals), 0.0, 1.0)["a"]
    assert torch.equal(found[:, 3], W[:, 3])
    assert found.isfinite().all()


def test_the_target_is_in_the_type_of_the_weights():
    W, *seen = problem(6)
    found, _ = targets({"a": W.bfloat16()}, lack(W, *seen), 0.01, 0.5)["a"]
    assert found.dtype == torch.bfloat16


def table_of_the_specification() -> list[float]:
    """Errors of W with H of the original and of the quantized model, and of three targets.

    64 inputs, 48 outputs, 4000 tokens and a grid of step 0.8; what the inputs lose is not said, and
    was chosen here so that the first row comes near: white noise, on a spectrum that falls.
    """
    m, n, tokens, step = 48, 64, 4000, 0.8
    rng = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(*size, generator=rng, dtype=torch.float64)  # noqa: E731
    W, Q = draw(m, n), torch.linalg.qr(draw(n, n))[0]
    values = (1 + torch.arange(n, dtype=torch.float64)) ** -1.2
    originals = draw(tokens, n) @ (Q * (values / values.mean()).sqrt()).T
    inputs = originals + 0.38 * draw(tokens, n)
    e = (originals - inputs) @ W.T
    known = Lack(H=inputs.T @ inputs / tokens, C={"": e.T @ inputs / tokens}, count=tokens)

    def error(target: Tensor, H: Tensor) -> float:
        F, _ = reference.ldl(H)
        W_hat = step * reference.round_with_feedback(target / step, F, reference.nearest)
        right = originals @ W.T
        return float((inputs @ W_hat.T - right).square().sum() / right.square().sum())

    found = [error(W, originals.T @ originals / tokens), error(W, known.H)]
    for alpha in (0.25, 0.5, 1.0):
        found.append(error(targets({"": W}, known, 0.0, alpha)[""][0], known.H))
    return found


def test_errors_are_near_those_of_the_specification():
    expected = [0.1828, 0.1806, 0.1613, 0.1477, 0.1325]
    assert table_of_the_specification() == pytest.approx(expected, rel=0.03)
