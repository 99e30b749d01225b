"""Fine-tuning: what is trained, that it helps, and that nothing changes where it does not."""

import copy
import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quip.errors import UnsupportedModel, UsageError
from quip.evaluate.divergence import divergence
from quip.kernels.bits import unpack
from quip.kernels.hadamard import rotate
from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.model.ledger import Ledger
from quip.model.matrices import coverage
from quip.model.records import Stopwatch
from quip.model.tune import BlockTuning, ModelTuning, tune_model, whole
from quip.model.tune.descent import _std_error, is_noise
from quip.model.tune.tunable import MasterWeights
from quip.packed.checkpoint import load
from quip.packed.linear import QuantizedLinear, quantized_layers
from tests.support.checkpoints import save
from tests.support.tuning import DRAWN, FEW, LATTICE, changed, quantized, short, state

GRID = build_recipe(quant="ldlq", wbits=2, incoh_processing=True, rotation="hadamard")
KRONECKER = build_recipe(quant="ldlq", wbits=2, incoh_processing=True)
RECIPES = {"E8P12": LATTICE, "int and hadamard": GRID, "int and kronecker": KRONECKER}
# Rates for few windows, and weights of 0.3.
FAST = BlockTuning(lr=1e-3, signs_lr=3e-3, batch_size=8, epochs=2)
WHOLE = ModelTuning(lr=1e-3, signs_lr=1e-2, epochs=2)
HOPELESS = {"lr 0": {"lr": 0.0, "signs_lr": 0.0}, "absurd": {"lr": 1e3, "signs_lr": 1e3}}
VECTORS = build_recipe(wbits=2, codebook="vq", vq_dim=2, groupsize=256, columns_per_group=16)


# What is trained


@pytest.fixture
def layer(problem) -> QuantizedLinear:
    W, H = (x.float() for x in problem(24, 48))
    made = quantize_matrix(W, H, LATTICE, rng=torch.Generator().manual_seed(0))
    return QuantizedLinear.from_matrix(made, None)


def test_gradients_are_those_of_the_dense_formula(layer, rng):
    """W_hat = S_out Omega_m W~ Omega_n^T S_in, multiplied out in float64."""
    x, weigh = torch.randn(5, 48, generator=rng), torch.randn(5, 24, generator=rng)
    decoder, _ = layer.spec.restore(layer.stored(), 24, 48)
    W_t = decoder.decode(unpack(layer.codes, decoder.index_bits, 6)).double()
    with MasterWeights(layer, [], dtype=torch.float32) as masters:
        (layer(x) * weigh).sum().backward()
        s_in, s_out = (p.detach().double().requires_grad_() for p in masters.signs)
        W = s_out[:, None] * rotate(rotate(W_t).T).T * s_in
        (x.double() @ W.T * weigh).sum().backward()
        for found, expected in zip(masters.signs, (s_in, s_out), strict=True):
            torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("name", ["llama", "opt"])
@torch.no_grad()
def test_the_trainable_form_computes_what_the_packed_one_does(name, recipe):
    model, _, _ = quantized(name, recipe)
    expected = model(DRAWN).logits
    with MasterWeights(model, [], dtype=torch.float32):
        torch.testing.assert_close(model(DRAWN).logits, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(model(DRAWN).logits, expected)


def test_what_is_kept_is_stored_in_the_types_it_had_and_computes_the_same(rng):
    model, _, _ = quantized(dtype=torch.bfloat16)
    before, dtypes = state(model), {k: x.dtype for k, x in model.state_dict().items()}
    norms = [p for p in model.parameters() if p.ndim == 1]
    with torch.no_grad(), MasterWeights(model, norms, dtype=torch.float32) as masters:
        for parameter in (*masters.signs, *masters.others):
            assert parameter.dtype == torch.float32
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=rng))
        exact = model(DRAWN).logits
        with masters.as_stored() as kept:
            rounded = model(DRAWN).logits
        assert torch.equal(model(DRAWN).logits, exact)
        assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.05
        masters.keep(kept)
    assert {k: x.dtype for k, x in model.state_dict().items()} == dtypes
    names = {name.rpartition(".")[2] for name in changed(model, before)}
    assert names == {"signs_in", "signs_out", "weight"}
    with torch.no_grad():  # in float32, but from what is stored
        torch.testing.assert_close(model.float()(DRAWN).logits, rounded, rtol=1e-3, atol=1e-3)


# Blocks, while they are quantized


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_held_out_loss_of_a_block_never_rises_and_falls(name, recipe):
    model, records, tuned = quantized(name, recipe, tuning=FAST)
    assert sorted(r.name for r in records) == sorted(coverage(short(name)).quantized)
    assert len(tuned) == 2 * 3  # after all groups of matrices of a block but the last
    assert all(r.loss_after <= r.loss_before for r in tuned)
    assert math.prod(r.loss_after / r.loss_before for r in tuned) < 0.8
    assert not any("product" in vars(layer) for layer in quantized_layers(model).values())


def test_matrices_to_come_and_norms_move_and_codes_do_not(monkeypatch):
    from quip.model.tune.blocks import BlockTuner

    seen, real = [], BlockTuner.tune

    def watched(self, after):
        before = state(self.block.module)
        record = real(self, after)
        moved = changed(self.block.module, before)
        seen.append((after[-1].rpartition(".")[2], moved, record))
        return record

    monkeypatch.setattr(BlockTuner, "tune", watched)
    quantized(tuning=replace(FAST, epochs=1))
    last, moved, record = seen[1]
    assert last == "o_proj"
    assert record.loss_after < record.loss_before
    stacked = {f"self_attn.q_proj.stack.{name}" for name in ("signs_in", "signs_out")}
    alone = {f"self_attn.o_proj.{name}" for name in ("signs_in", "signs_out")}
    matrices = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert moved == stacked | alone | matrices | norms


@pytest.mark.parametrize(
    ("rates", "dtype"), [("lr 0", torch.float32), ("absurd", torch.bfloat16)], ids=HOPELESS
)
def test_a_block_that_does_not_improve_is_left_bitwise_as_it_was(rates, dtype):
    plain, _, _ = quantized(dtype=dtype)
    model, _, tuned = quantized(dtype=dtype, tuning=replace(FAST, **HOPELESS[rates]))
    assert changed(model, state(plain)) == set()
    assert all(r.loss_after == r.loss_before for r in tuned)
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in plain.parameters()
    ]


def test_a_bfloat16_model_is_tuned_in_float32_and_stays_bfloat16():
    plain, _, _ = quantized(dtype=torch.bfloat16)
    model, _, tuned = quantized(dtype=torch.bfloat16, tuning=FAST)
    assert any(r.loss_after < r.loss_before for r in tuned)
    assert {k: x.dtype for k, x in state(model).items()} == {
        k: x.dtype for k, x in state(plain).items()
    }


class Stopped(Exception):
    pass


@pytest.mark.parametrize("recipe", [LATTICE, VECTORS], ids=["E8P12", "vq"])
def test_a_run_that_was_broken_off_is_taken_up_with_the_same_tuning(tmp_path, monkeypatch, recipe):
    once = replace(FAST, epochs=1)
    expected, _, tuned = quantized(recipe=recipe, tuning=once)
    ledger, keep = Ledger(tmp_path, {}), Ledger.keep
    ledger.open()

    def stop(self, block, records, *rest):
        if block.index == 1:
            raise Stopped
        keep(self, block, records, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "keep", stop)
        with pytest.raises(Stopped):
            quantized(recipe=recipe, tuning=once, ledger=ledger)
    model, _, again = quantized(recipe=recipe, tuning=once, ledger=ledger)
    assert changed(model, state(expected)) == set()
    assert [r.loss_after for r in again] == [r.loss_after for r in tuned]


def test_each_tuning_is_logged_and_timed(caplog):
    watch = Stopwatch()
    with caplog.at_level(logging.INFO, logger="quip"):
        _, _, tuned = quantized(tuning=replace(FAST, epochs=1), watch=watch)
    lines = [r.getMessage() for r in caplog.records if "held-out loss" in r.getMessage()]
    assert len(lines) == len(tuned)
    assert lines[0].startswith("model.layers.0, tuned after model.layers.0.self_attn.v_proj: ")
    assert watch.seconds["tune"] > 0


NONSENSE = {
    "epochs": 0,
    "lr": -1.0,
    "signs_lr": math.nan,
    "centroids_lr": math.inf,
    "batch_size": 0,
    "patience": 0,
    "held_out": 1.0,
}


@pytest.mark.parametrize("name", NONSENSE)
def test_numbers_that_mean_nothing_are_refused(name):
    with pytest.raises(UsageError, match=f"fine-tuning: {name} {NONSENSE[name]}"):
        BlockTuning(**{name: NONSENSE[name]})


def test_the_standard_error_of_a_gain_is_that_of_its_windows():
    before, after = [1.0, 2.0, 4.0, 3.0], [0.5, 2.1, 3.0, 2.5]
    gains = torch.tensor(before) - torch.tensor(after)
    assert _std_error(before, after) == pytest.approx(float(gains.std()) / 2)
    assert _std_error([1.0], [0.5]) is None
    assert is_noise(1.0, 0.5, None)
    assert is_noise(1.0, 0.5, 0.5)
    assert is_noise(1.0, 1.0, 0.0)
    assert not is_noise(1.0, 0.5, 0.49)


def test_windows_are_held_out_whatever_their_number():
    tuning = BlockTuning(held_out=0.25)
    assert tuning.split([2, 2, 2, 1]) == ([0, 1, 2], [3])
    assert tuning.split([1, 1]) == ([0], [1])
    assert replace(tuning, held_out=0.9).split([1, 1, 1]) == ([0], [1, 2])
    with pytest.raises(UsageError, match="2 windows or more"):
        tuning.held(1)


# The whole model


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """fresh(name) -> a copy of a tiny quantized model, whose head is tied if it is OPT's."""
    made = {}
    for name in ("llama", "opt"):
        model, _, _ = quantized(name)
        folder = save(model, tmp_path_factory.mktemp("whole") / name)
        made[name] = load(folder)
    return lambda name="llama": copy.deepcopy(made[name])


def tuned_whole(student, tuning=WHOLE, *, teacher=None, **options):
    teacher = teacher or short("opt" if "OPT" in type(student).__name__ else "llama")
    return tune_model(student, teacher, FEW, tuning, device="cpu", seed=0, **options)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_divergence_from_the_teacher_falls_on_windows_held_out(packed, name):
    student, held = packed(name), FEW[-4:]
    kl = divergence(student, short(name), held, device="cpu").kl
    record = tuned_whole(student)
    assert (record.windows, record.windows_held_out, record.improved) == (12, 4, True)
    # The trainable form sums in another order.
    assert record.kl_before == pytest.approx(kl, rel=1e-3)
    found = divergence(student, short(name), held, device="cpu").kl
    assert record.kl_after == pytest.approx(found, rel=1e-3)
    assert found < kl


def test_a_tuning_says_whether_its_gain_is_more_than_noise(packed):
    student, teacher, held = packed("opt"), short("opt"), FEW[-4:]

    def each() -> Tensor:
        return torch.tensor(
            [divergence(student, teacher, one, device="cpu").kl for one in held.split(1)]
        )

    before = each()
    record = tuned_whole(student, teacher=teacher)
    gains = before - each()
    assert record.kl_std_error == pytest.approx(float(gains.std()) / 2, rel=1e-2)
    assert record.within_noise == (float(gains.mean()) <= float(gains.std()) / 2)
    one_held = replace(WHOLE, held_out=0.01, epochs=1)
    assert tuned_whole(packed("opt"), one_held).within_noise  # a single window says nothing


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("opt", True)])
def test_the_head_is_tuned_unless_it_is_the_embedding(packed, caplog, name, tied):
    student = packed(name)
    before, flags = state(student), [p.requires_grad for p in student.parameters()]
    with caplog.at_level(logging.INFO, logger="quip"):
        record = tuned_whole(student)
    moved = changed(student, before)
    assert record.head is not tied
    assert ("lm_head.weight" in moved) is not tied
    assert any("tied" in r.getMessage() for r in caplog.records) is tied
    left = {k.rpartition(".")[2] for k in moved - {"lm_head.weight"}}
    assert left <= {"signs_in", "signs_out", "weight", "bias"}
    assert all(before[k].ndim == 1 for k in moved - {"lm_head.weight"})
    assert [p.requires_grad for p in student.parameters()] == flags
    assert all(p.grad is None for p in student.parameters())
    assert not any("product" in vars(layer) for layer in quantized_layers(student).values())


@pytest.mark.parametrize("rates", HOPELESS.values(), ids=HOPELESS)
def test_a_model_that_does_not_improve_is_left_bitwise_as_it_was(packed, rates):
    student = packed()
    before = state(student)
    record = tuned_whole(student, replace(WHOLE, **rates))
    assert not record.improved
    assert record.epochs <= WHOLE.patience
    assert changed(student, before) == set()


def test_the_teacher_is_run_window_by_window_and_its_logits_are_dropped(packed, monkeypatch):
    import weakref

    teacher, alive, most = short(), [], 0
    real = teacher.forward

    def watched(*args, **options):
        nonlocal most
        output = real(*args, **options)
        assert not output.logits.requires_grad
        assert len(output.logits) == 1
        alive.append(weakref.ref(output.logits))
        most = max(most, sum(one() is not None for one in alive))
        return output

    monkeypatch.setattr(teacher, "forward", watched)
    tuned_whole(packed(), teacher=teacher)
    assert len(alive) == 4 + 2 * 16
    assert most <= 2  # at times the one before, until its last name is given to the next


def test_a_chunk_of_positions_at_a_time_gives_the_same(packed, monkeypatch):
    plain = tuned_whole(packed())
    monkeypatch.setattr(whole, "CHUNK", 3 * 64)
    chunked = tuned_whole(packed())
    assert chunked.kl_after == pytest.approx(plain.kl_after, rel=1e-4)


def test_the_same_seed_gives_the_same_model(packed):
    one, other = packed(), packed()
    tuned_whole(one)
    tuned_whole(other)
    assert changed(one, state(other)) == set()


def test_teachers_that_cannot_teach_are_refused_by_name(packed):
    with pytest.raises(UnsupportedModel, match=r"the teacher .* is quantized itself"):
        tuned_whole(packed(), teacher=packed())
    other = short()
    other.config.vocab_size = 65
    other.name_or_path = "other/model"
    with pytest.raises(UnsupportedModel, match="the teacher other/model has a vocabulary of 65"):
        tuned_whole(packed(), teacher=other)
    with pytest.raises(UsageError, match="teacher is in training mode"):
        tuned_whole(packed(), teacher=short().train())
