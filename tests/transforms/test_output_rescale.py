"""Rescaling of the outputs: the mirror of QuIP's rescaling, by what the loss feels of each."""

import pytest
import torch
from torch import Tensor

from quip.errors import UsageError
from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.matrix.seeds import rng_for
from quip.transforms import (
    Chain,
    HadamardDraw,
    KroneckerDraw,
    OutputRescaleDraw,
    RescaleDraw,
    rescales_outputs,
)
from quip.transforms.haar import FILE_DTYPE
from quip.transforms.rescale import balanced
from quip.transforms.vectors import Vectors
from tests import reference_sensitivity as ref
from tests.laws import assert_near

RECIPES = {
    "hadamard": {"codebook": "E8P12"},
    "kronecker": {"wbits": 2, "pre_proj": True, "qfn": "b"},
    "trellis": {"codebook": "trellis", "wbits": 2, "trellis_states": 8},
}


def felt(m: int) -> Tensor:
    return torch.rand(m, generator=torch.Generator().manual_seed(5)).double() ** 4


def test_the_factors_are_those_of_the_formula(problem, rng):
    W, H = problem(12, 20)
    f, sizes = felt(12), W.square().sum(1)
    raised = W * (1 + 0.01 * sizes.mean() / sizes).sqrt()[:, None]  # as f is raised
    expected = ref.rescale_outputs(raised, f)
    r = OutputRescaleDraw()(W, H, rng, f).r
    torch.testing.assert_close(r, expected / expected.mean(), rtol=2**-8, atol=0)  # of bfloat16
    assert torch.equal(r, r.to(FILE_DTYPE).double())


def test_the_factors_minimise_what_the_loss_rises_by(problem):
    W, _ = problem(12, 20)
    f, sizes = felt(12), W.square().sum(1)

    def damage(r: Tensor) -> float:
        raised, larger = f + 0.01 * f.mean(), sizes + 0.01 * sizes.mean()
        return float((raised * r**2).sum() * (larger / r**2).sum())

    best = balanced(W, f, torch.float64)
    for i in range(12):
        for factor in (0.97, 1.03):
            r = best.clone()
            r[i] *= factor
            assert damage(r) > damage(best)
    raised, larger = f + 0.01 * f.mean(), sizes + 0.01 * sizes.mean()
    share = damage(best) / float(raised.sum() * larger.sum())
    scaled = W * (larger / sizes).sqrt()[:, None]
    assert share == pytest.approx(ref.rescale_factor(scaled, raised), rel=1e-12)
    assert share < 0.9


@pytest.mark.parametrize("flags", RECIPES.values(), ids=RECIPES)
def test_outputs_that_feel_their_own_size_leave_the_codes_as_they_are(problem, flags):
    W, H = problem(32, 64)
    f = 3.7 * W.square().sum(1)
    plain, rescaled = (
        quantize_matrix(W, H, build_recipe(**flags, pre_rescale_out=on), rng=rng_for(0, "w"), f=f)
        for on in (False, True)
    )
    assert torch.equal(plain.codes, rescaled.codes)
    assert torch.equal(plain.dequantize(), rescaled.dequantize())


@pytest.mark.parametrize("flags", RECIPES.values(), ids=RECIPES)
def test_rescaled_outputs_cost_less_where_the_loss_feels_them(problem, flags):
    W, H = problem(64, 128)
    f = torch.ones(64).double()  # while rows are of very different sizes
    losses = []
    for on in (False, True):
        recipe = build_recipe(**flags, pre_rescale_out=on)
        E = quantize_matrix(W, H, recipe, rng=rng_for(0, "w"), f=f).dequantize().double() - W
        losses.append(float((f * ((E @ H) * E).sum(1)).sum()))
    expected = ref.rescale_factor(W, f)
    assert losses[1] / losses[0] == pytest.approx(expected, rel=0.25)  # of one draw of rotations


def test_factors_are_free_in_the_signs_of_outputs_and_two_bytes_elsewhere(problem):
    W, H = problem(32, 64)
    bits = {}
    for name, flags in RECIPES.items():
        for on in (False, True):
            recipe = build_recipe(**flags, pre_rescale_out=on)
            found = quantize_matrix(W, H, recipe, rng=rng_for(0, "w"), f=felt(32))
            bits[name, on] = found.bits_per_weight
    assert bits["hadamard", True] == bits["hadamard", False]
    assert bits["trellis", True] == bits["trellis", False]
    assert bits["kronecker", True] == pytest.approx(bits["kronecker", False] + 16 / 64)


@pytest.mark.parametrize(
    "draws",
    [
        [OutputRescaleDraw(), KroneckerDraw()],
        [RescaleDraw(), OutputRescaleDraw(), KroneckerDraw()],
        [RescaleDraw(), HadamardDraw(None, rescales_outputs=True)],
    ],
    ids=["kronecker", "both, kronecker", "both, hadamard"],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_vectors_are_turned_in_one_pass(problem, rng, draws, scaled):
    W, H = problem(32, 64)
    chain, *_ = Chain.draw(draws, W.float(), H, rng, f=felt(32))
    scales = torch.rand(32) + 0.5 if scaled else None
    vectors, y, x = Vectors.of(chain, scales), torch.randn(3, 32), torch.randn(3, 64)
    assert vectors.turn is not None
    expected = chain.output(y) if scales is None else chain.output(y) * scales
    assert_near(vectors.output(y, torch.float32), expected, 1e-6)
    assert_near(vectors.input(x), chain.input(x), 1e-6)


def test_what_the_loss_feels_must_be_known(problem):
    W, H = problem(32, 64)
    recipe = build_recipe(codebook="E8P12", pre_rescale_out=True)
    assert rescales_outputs(recipe.transforms)
    with pytest.raises(UsageError, match=r"quip run.*or leave out --pre_rescale_out"):
        quantize_matrix(W, H, recipe, rng=rng_for(0, "w"))


def test_rows_that_are_not_rotated_are_not_rescaled():
    with pytest.raises(UsageError, match=r"--pre_rescale_out balances the rows.*--pre_proj"):
        build_recipe(wbits=2, pre_rescale_out=True)
