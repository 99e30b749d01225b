"""Fine-tuning of learned codebooks: their centroids move, their codes stay."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quip.errors import NonFinite
from quip.evaluate.divergence import divergence
from quip.kernels.bits import unpack
from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.model.tune import BlockTuner, BlockTuning, ModelTuning, tune_model
from quip.model.tune.descent import _rates
from quip.model.tune.tunable import MasterWeights, Tunable
from quip.packed.checkpoint import load
from quip.packed.linear import QuantizedLinear, quantized_layers
from tests.support.checkpoints import quantized as loadable
from tests.support.checkpoints import save
from tests.support.tuning import DRAWN, LATTICE, changed, quantized, short, state

WINDOWS = DRAWN[:24]
ONLY = {"lr": 0.0, "signs_lr": 0.0}
WHOLE = ModelTuning(epochs=2, **ONLY)
SMALL = {"codebook": "vq", "groupsize": 256, "columns_per_group": 16, "em_iters": 20}
SCALED = {"vq_scaling": 8, "quant": "gptq", **SMALL}
WHOLE_ROWS = {**SMALL, "columns_per_group": 128, "quant": "gptq"}
RECIPES = {
    "1D": {"vq_dim": 1, "wbits": 2, **SMALL},
    "2D": {"vq_dim": 2, "wbits": 2, **SMALL},
    "4D": {"vq_dim": 4, "wbits": 1, **SMALL},
    "2D, entries of 16 bits": {"vq_dim": 2, "wbits": 2, "codebook_bits": 16, **SMALL},
    "2D, entries of 4 bits": {"vq_dim": 2, "wbits": 2, "codebook_bits": 4, **WHOLE_ROWS},
    "2D, scales": {"vq_dim": 2, "wbits": 2, **SCALED},
    "2D as published": {"vq_dim": 2, "wbits": 2, "faithful": True, **SMALL},
}
STORED = {"centroids", "centroid_scale"}
SCALES = {"2D, scales": "scale_range", "2D, entries of 4 bits": "units"}
two_d = build_recipe(**RECIPES["2D"])


@pytest.fixture(scope="module")
def packed():
    """fresh(name) -> a copy of a tiny model quantized by the recipe of this name."""
    made: dict[str, nn.Module] = {}

    def fresh(name: str = "2D") -> nn.Module:
        if name not in made:
            made[name] = quantized(recipe=build_recipe(**RECIPES[name]))[0]
        return copy.deepcopy(made[name])

    return fresh


def tuned(student: nn.Module, tuning: ModelTuning = WHOLE):
    return tune_model(student, short(), WINDOWS, tuning, device="cpu", seed=0)


def decoded(layer: QuantizedLinear) -> Tensor:
    """W~ of what the layer holds."""
    m, n = layer.out_features, layer.in_features
    decoder, _ = layer.spec.restore(layer.stored(), m, n)
    return decoder.decode(unpack(layer.codes, decoder.index_bits, n // decoder.dim))


def last_names(names: set[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


# A decoder and its centroids


@pytest.mark.parametrize("name", RECIPES)
def test_a_decoder_decodes_what_it_learns_and_keeps_it_rounded(problem, rng, name):
    W, H = (x.float() for x in problem(32, 48))
    made = quantize_matrix(W, H, build_recipe(**RECIPES[name]), rng=rng)
    decoder, values = made.decoder, made.decoder.learnable()
    assert torch.equal(decoder.decode_with(made.codes, values), decoder.decode(made.codes))
    noise = 0.1 * torch.randn(values["centroids"].shape, generator=rng)
    moved = {"centroids": values["centroids"] + values["centroids"].square().mean().sqrt() * noise}
    learned = decoder.learned(moved)
    shapes = {key: (x.shape, x.dtype) for key, x in decoder.tensors().items()}
    assert {key: (x.shape, x.dtype) for key, x in learned.tensors().items()} == shapes
    W_t = decoder.decode_with(made.codes, learned.learnable())
    assert torch.equal(learned.decode(made.codes), W_t)
    exact, before = decoder.decode_with(made.codes, moved), decoder.decode(made.codes)
    coarse = 1.0 if "4 bits" in name else 0.1  # entries there are whole numbers from -8 to 7
    assert (W_t - exact).norm() < coarse * (exact - before).norm()


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_of_centroids_are_sums_over_their_weights(problem, rng, name):
    W, H = (x.float() for x in problem(32, 48))
    made = quantize_matrix(W, H, build_recipe(**RECIPES[name]), rng=rng)
    weigh = torch.randn(32, 48, generator=rng)
    values = {k: x.double().requires_grad_() for k, x in made.decoder.learnable().items()}
    (made.decoder.decode_with(made.codes, values) * weigh).sum().backward()
    # W~ is linear in the centroids: its inner product with `weigh` is theirs with the gradients.
    direction = torch.randn(values["centroids"].shape, generator=rng).double()
    expected = (made.decoder.decode_with(made.codes, {"centroids": direction}) * weigh).sum()
    found = (values["centroids"].grad * direction).sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "moves"), SCALES.items())
def test_gradients_reach_the_scales_of_runs_and_their_tensors_follow(problem, rng, name, moves):
    W, H = (x.float() for x in problem(32, 48))
    made = quantize_matrix(W, H, build_recipe(**RECIPES[name]), rng=rng)
    values = {k: x.requires_grad_() for k, x in made.decoder.learnable().items()}
    assert {*values} == {"centroids", moves}
    weigh = torch.randn(32, 48, generator=rng)
    (made.decoder.decode_with(made.codes, values) * weigh).sum().backward()
    step = 1e-2 * values[moves].detach() * torch.randn(values[moves].shape, generator=rng)
    up, down = (
        made.decoder.decode_with(
            made.codes, {**values, moves: values[moves].detach() + sign * step}
        )
        for sign in (1, -1)
    )
    slope = ((up - down) * weigh).sum() / 2
    expected = (values[moves].grad * step).sum()
    torch.testing.assert_close(slope, expected, rtol=1e-2, atol=1e-3)  # 2^x is no straight line
    learned = made.decoder.learned({k: x.detach() for k, x in values.items()} | {moves: step})
    assert torch.equal(learned.tensors()[moves], step.to(made.decoder.tensors()[moves].dtype))


# States


@torch.no_grad()
def test_the_trainable_form_computes_what_the_packed_one_does(packed):
    model = packed()
    expected = model(DRAWN).logits
    with MasterWeights(model, [], dtype=torch.float32):
        torch.testing.assert_close(model(DRAWN).logits, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(model(DRAWN).logits, expected)


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_a_state_is_compared_and_kept_as_stored_and_masters_are_not_rounded(packed, rng, name):
    model = packed(name)
    layers = quantized_layers(model).values()
    with MasterWeights(model, [], dtype=torch.float32) as masters:
        for parameter in masters.centroids:
            parameter.mul_(1 + 0.05 * torch.rand(parameter.shape, generator=rng))
        exact = [parameter.clone() for parameter in masters.centroids]
        with masters.as_stored() as kept:
            compared = [layer.product.__self__.W for layer in layers]
        after = zip(masters.centroids, exact, strict=True)
        assert all(torch.equal(x, y) for x, y in after)
        rounded = [layer.product.__self__.W for layer in layers]
        assert not any(torch.equal(x, y) for x, y in zip(rounded, compared, strict=True))
        masters.keep(kept)
    for layer, W_t in zip(layers, compared, strict=True):
        assert torch.equal(decoded(layer), W_t)


def test_steps_below_the_rounding_of_centroids_add_up(packed):
    model = packed()
    layer = next(iter(quantized_layers(model).values()))
    step = layer.centroid_scale.float().min()
    with torch.no_grad(), MasterWeights(model, [], dtype=torch.float32) as masters:
        for _ in range(40):
            masters.centroids[0][0, 0, 0, 0] -= 0.05 * step
            with masters.as_stored() as kept:
                pass
        masters.keep(kept)
    assert changed(model, state(packed())) != set()


def test_what_a_lattice_decodes_to_is_held_and_has_no_centroids(problem, rng):
    W, H = (x.float() for x in problem(32, 48))
    made = [quantize_matrix(W, H, recipe, rng=rng) for recipe in (LATTICE, two_d)]
    lattice, learned = (Tunable(QuantizedLinear.from_matrix(x, None), torch.float32) for x in made)
    assert lattice.W is lattice.W
    assert not lattice.learnt
    assert learned.W is not learned.W
    assert [*learned.learnt] == ["centroids"]


def test_the_rate_of_centroids_is_a_share_of_their_size(packed):
    model = packed()
    with MasterWeights(model, [], dtype=torch.float32) as masters:
        masters.signs.clear()
        groups = _rates(masters, replace(WHOLE, centroids_lr=0.01))
        assert [group["params"] for group in groups] == [[x] for x in masters.centroids]
        for group in groups:
            (x,) = group["params"]
            assert group["lr"] == pytest.approx(0.01 * float(x.detach().square().mean().sqrt()))


# The whole model


@pytest.mark.parametrize("name", ["1D", "2D", "4D", "2D, scales"])
def test_centroids_move_codes_stay_and_the_divergence_falls(packed, name):
    student, before = packed(name), state(packed(name))
    record = tuned(student)
    assert record.improved
    numbers = sum(x.numel() for k, x in before.items() if k.endswith("centroids"))
    assert record.parameters > numbers
    names = last_names(changed(student, before))
    assert "centroids" in names
    assert names <= STORED | {SCALES.get(name)}
    assert name not in SCALES or SCALES[name] in names
    found = divergence(student, short(), WINDOWS[-6:], device="cpu").kl
    assert record.kl_after == pytest.approx(found, rel=1e-3)


@pytest.mark.slow
def test_moving_centroids_too_gains_more_than_moving_signs_and_norms(packed):
    others = {"lr": 1e-3, "signs_lr": 1e-2}
    without, both = (
        tuned(packed(), replace(WHOLE, centroids_lr=rate, **others)).kl_after
        for rate in (0.0, 5e-3)
    )
    assert both < 0.97 * without


@pytest.mark.parametrize("rate", [0.0, 1e3], ids=["rate 0", "absurd"])
@pytest.mark.parametrize("name", ["2D", "2D, entries of 16 bits", "2D, entries of 4 bits"])
def test_centroids_that_do_not_improve_are_left_bitwise_as_they_were(packed, name, rate):
    student = packed(name)
    record = tuned(student, replace(WHOLE, centroids_lr=rate))
    assert not record.improved
    assert changed(student, state(packed(name))) == set()


def test_a_start_that_is_not_finite_leaves_all_as_it_was(packed):
    student = packed()
    with torch.no_grad():
        student.model.norm.weight[3] = torch.nan
    before = {name: x.nan_to_num(7.0) for name, x in state(student).items()}
    with pytest.raises(NonFinite):
        tuned(student)
    with torch.no_grad():
        student.model.norm.weight.nan_to_num_(7.0)
    assert changed(student, before) == set()


def test_a_tuned_model_comes_back_bitwise(tmp_path):
    student = loadable("llama", RECIPES["2D"], blocks=2)
    before = state(student)
    tuned(student)
    assert last_names(changed(student, before)) == STORED
    again = load(save(student, tmp_path / "tuned"))
    assert changed(again, state(student)) == set()


# Blocks, while they are quantized


FAST = BlockTuning(lr=1e-3, signs_lr=3e-3, centroids_lr=5e-3, batch_size=8, epochs=2)


@pytest.mark.parametrize("name", ["2D", "4D"])
def test_a_block_is_tuned_after_its_last_matrix_too(name):
    model, _, found = quantized(recipe=build_recipe(**RECIPES[name]), tuning=FAST)
    assert len(found) == 2 * 4
    assert found[3].after[-1].endswith("down_proj")
    assert all(r.loss_after <= r.loss_before for r in found)
    assert all(r.loss_after < r.loss_before for r in found[::4])
    assert not any("product" in vars(layer) for layer in quantized_layers(model).values())


def test_the_centroids_of_a_block_move_with_its_signs(monkeypatch):
    seen, real = [], BlockTuner.tune

    def watched(self, after):
        before = state(self.block.module)
        record = real(self, after)
        seen.append(changed(self.block.module, before))
        return record

    monkeypatch.setattr(BlockTuner, "tune", watched)
    quantized(recipe=two_d, tuning=replace(FAST, **ONLY))
    stack = {f"self_attn.q_proj.stack.{name}" for name in STORED}
    assert seen[0] == stack
    assert seen[1] == stack | {f"self_attn.o_proj.{name}" for name in STORED}
