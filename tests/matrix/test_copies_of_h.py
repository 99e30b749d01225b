"""How many matrices of the size of H are held at once while one matrix is quantized."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from quip.matrix.build import build_recipe
from quip.matrix.feedback import none
from quip.matrix.hessian import Hessian
from quip.matrix.linalg import proxy_loss
from quip.matrix.quantize import quantize_matrix
from quip.matrix.seeds import rng_for

N = 1536  # far wider than the strips that are worked on at once


def peak_beside(work: Callable[[], object]) -> float:
    """The most bytes that tensors take while this runs, in matrices [N, N] of float64."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / (8 * N * N)


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ({"wbits": 2, "quant": "nearest"}, 1.3),
        ({"wbits": 2, "quant": "gptq"}, 1.6),
        ({"wbits": 2, "quant": "ldlq"}, 1.6),
        ({"wbits": 2, "incoh_processing": True}, 1.8),
        ({"wbits": 2, "incoh_processing": True, "rotation": "hadamard"}, 1.7),
        ({"codebook": "E8P12"}, 3.1),  # with a pass that reads H once more
    ],
)
def test_few_matrices_of_the_size_of_h_are_held(flags, most):
    x = torch.randn(256, N, generator=torch.Generator().manual_seed(0))
    H, W = x.T @ x, x[:64].clone()
    before = W.clone(), H.clone()
    recipe = build_recipe(**flags)
    quantize_matrix(W[:, :64], H[:64, :64], recipe, rng=rng_for(0, "a"))  # kept for good: tables
    peak = peak_beside(lambda: quantize_matrix(W, H, recipe, rng=rng_for(0, "a")))
    assert 0.9 < peak < most
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_moments_are_taken_in_half_the_memory_of_their_sums():
    hessian = Hessian(N)
    hessian.update(torch.randn(8, N))
    expected = hessian.value()
    found = []
    assert peak_beside(lambda: found.append(hessian.take())) < 0.9
    assert torch.equal(found[0].double(), expected)


def test_moments_to_which_nothing_is_added_wait_in_half_the_memory():
    hessian = Hessian(N)
    hessian.update(torch.randn(8, N))
    expected, mean = hessian.value(), hessian.mean()
    hessian.finish()
    held = sum(x.nbytes for x in vars(hessian).values() if isinstance(x, torch.Tensor))
    assert held < 0.6 * 8 * N * N
    assert torch.equal(hessian.value(), expected)
    assert torch.equal(hessian.mean(), mean)
    assert torch.equal(hessian.take().double(), expected)
    assert not any(x.numel() > 2 * N for x in vars(hessian).values() if torch.is_tensor(x))


def test_a_loss_takes_little_more_than_what_h_makes_of_the_errors():
    x = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    H, W = x.T @ x, x.bfloat16()
    found = []
    # E H is 1; and the tiles that it is made of, where E, W and H would be 3.
    assert peak_beside(lambda: found.append(proxy_loss(W, x, H))) < 2.5
    E, W = x.double() - W, W.double()
    expected = ((E @ H.double()) * E).sum() / ((W @ H.double()) * W).sum()
    assert found[0] == pytest.approx(expected.item(), rel=1e-12)  # sums in another order at most


def test_rounding_to_nearest_does_not_hold_h():
    _, h = none(torch.eye(N, dtype=torch.float64))
    assert h.untyped_storage().nbytes() == 8 * N
