"""Matrices that cannot be, are damped, or hold inputs that are never there."""

from dataclasses import replace

import pytest
import torch

from quip import transforms
from quip.errors import NonFinite, NotPositiveDefinite
from quip.matrix.build import METHODS, build_recipe
from quip.matrix.prepare import condition
from tests.laws import GRIDS
from tests.support.matrices import failing, plain, quantized

QUANTS = pytest.mark.parametrize("quant", METHODS)
INCOHERENT = {"incoh_processing": True}


# Bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quant", ["nearest", "ldlq"])
def test_what_is_not_finite_is_named(problem, quant, value):
    built = build_recipe(quant=quant, wbits=2)
    W, H = problem(6, 20)
    W[2, 3] = value
    with pytest.raises(NonFinite, match=r"block\.7\.fc1: the weights hold NaN or infinity; reload"):
        quantized(W, H, built, name="block.7.fc1")
    W, H = problem(6, 20)
    H[4, 4] = value
    with pytest.raises(NonFinite, match=r"block\.7\.fc1: the inputs' second moments .*--dtype"):
        quantized(W, H, built, name="block.7.fc1")


def test_a_singular_h_is_damped_and_the_damping_recorded(problem):
    W, H = problem(6, 20, dead=(3,))
    built = build_recipe(quant="ldlq", wbits=2, percdamp=0.0)
    q = quantized(W, H, built)
    assert q.damp == 1e-3
    again = quantized(W, H, replace(built, damp=1e-3))
    assert torch.equal(q.codes, again.codes)
    assert again.damp == 1e-3


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_damping_grows_tenfold_after_each_failure(problem, failures):
    W, H = problem(6, 20)
    seen: list[float] = []
    q = quantized(W, H, plain(feedback=failing(failures, seen)))
    assert q.damp == pytest.approx(0.01 * 10**failures)
    mean = float(H.diagonal().mean())
    assert seen == pytest.approx([mean * (1 + 0.01 * 10**k) for k in range(failures + 1)])


def test_an_escalation_redraws_the_same_rotations_for_more_damping(problem):
    W, H = problem(6, 20)
    fields_ = {"transforms": (transforms.RescaleDraw(), transforms.KroneckerDraw())}
    q = quantized(W, H, plain(feedback=failing(1), **fields_))
    direct = quantized(W, H, plain(damp=0.1, **fields_))
    assert torch.equal(q.codes, direct.codes)
    assert torch.equal(q.dequantize(), direct.dequantize())


def test_after_three_escalations_the_matrix_and_the_remedy_are_named(problem):
    W, H = problem(6, 20)
    message = (
        r"block\.7\.fc1: the smallest eigenvalue is -1\.00e-09 after damping by 10 of the mean "
        r"diagonal; add calibration tokens \(--nsamples\) or damp more \(--percdamp\)"
    )
    with pytest.raises(NotPositiveDefinite, match=message):
        quantized(W, H, plain(feedback=failing(4)), name="block.7.fc1")


def test_an_indefinite_h_is_hopeless(problem):
    W, H = problem(6, 20)
    H = H.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    H[3, 3] *= -1000
    with pytest.raises(NotPositiveDefinite, match="fc2: the smallest eigenvalue is -"):
        quantized(W, H, build_recipe(quant="gptq", wbits=2), name="fc2")


# Dead inputs


def test_weights_of_dead_inputs_become_zero_and_do_not_count(problem):
    W, H = problem(6, 20, dead=(3, 9))
    W_d, H_d = condition(W.float(), H.float())
    assert (W_d.dtype, H_d.dtype) == (torch.float32, torch.float64)
    assert bool((W_d[:, [3, 9]] == 0).all())
    assert torch.equal(W_d[:, 4:9], W.float()[:, 4:9])
    louder = W.clone()
    louder[:, [3, 9]] = 1e6
    for flags in GRIDS.values():
        built = build_recipe(quant="ldlq", wbits=2, **flags)
        assert torch.equal(
            quantized(W, H, built).dequantize(), quantized(louder, H, built).dequantize()
        )


@QUANTS
@pytest.mark.parametrize("percdamp", [0.0, 0.01])
def test_weights_of_dead_inputs_stay_small(problem, quant, percdamp):
    W, H = problem(16, 20, dead=(3, 9))
    for flags in ({}, INCOHERENT):
        built = build_recipe(quant=quant, wbits=2, percdamp=percdamp, **flags)
        W_hat = quantized(W, H, built).dequantize()
        assert float(W_hat[:, [3, 9]].abs().max()) < 5 * float(W.abs().max())
        assert flags or bool((W_hat[:, [3, 9]] == 0).all())
