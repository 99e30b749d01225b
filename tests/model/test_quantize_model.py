"""quantize_model on tiny models: what changes, what does not, and what is written down."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quip.matrix.build import build_recipe
from quip.matrix.recipe import Recipe
from quip.model import observe
from quip.model.matrices import coverage, find_blocks
from quip.model.quantize import quantize_matrix_by_matrix, quantize_model
from quip.model.records import MatrixRecord, Stopwatch
from quip.model.run import Run
from quip.packed.linear import QuantizedLinear
from tests.support.tiny import logits, tiny, tokens

NAMES = ["opt", "opt-350m", "llama"]


def recipe(bits: int = 2, *, incoherent: bool = True, quant: str = "ldlq") -> Recipe:
    return build_recipe(quant=quant, wbits=bits, incoh_processing=incoherent)


def quantized(
    name: str, how: Recipe, *, seed: int = 0, batch_size: int = 1, **options
) -> tuple[nn.Module, list[MatrixRecord]]:
    model = tiny(name, **options)
    records = quantize_model(model, tokens(), how, device="cpu", seed=seed, batch_size=batch_size)
    return model, records


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("incoherent", [True, False])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_the_loss_falls_as_bits_rise_and_8_bits_are_nearly_lossless(name, incoherent):
    original = logits(tiny(name))
    losses, distances = [], []
    for bits in (2, 3, 4, 8):
        model, records = quantized(name, recipe(bits, incoherent=incoherent))
        losses.append(sum(record.proxy_loss for record in records))
        distances.append(distance(logits(model), original))
    assert losses == sorted(losses, reverse=True)
    assert distances == sorted(distances, reverse=True)
    # Each bit quarters the loss; 20 covers six of them with a margin for the wide models' tails.
    assert losses[-1] < losses[0] / 4**6 * 20
    assert distances[-1] < 0.1  # random weights this large amplify a change some tenfold


@pytest.mark.parametrize("name", NAMES)
def test_only_the_weights_of_the_blocks_change(name):
    before = tiny(name).state_dict()
    model, _ = quantized(name, recipe())
    after = model.state_dict()
    assert before.keys() - after.keys() == {
        f"{matrix}.weight" for matrix in coverage(tiny(name)).quantized
    }
    assert all(torch.equal(before[key], after[key]) for key in before.keys() & after.keys())
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert layers.keys() == set(coverage(tiny(name)).quantized)
    stored = {f"{n}.{key}" for n, layer in layers.items() for key in layer.stored()}
    assert after.keys() - before.keys() == stored


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_is_recorded_once_with_its_shape_and_block(name):
    model, records = quantized(name, recipe())
    assert sorted(r.name for r in records) == sorted(coverage(tiny(name)).quantized)
    prefix, _ = find_blocks(model)
    for r in records:
        layer = model.get_submodule(r.name)
        assert (r.rows, r.columns) == (layer.out_features, layer.in_features)
        stored = sum(tensor.nbytes for tensor in layer.stored().values())
        assert r.bits_per_weight == 8 * stored / (r.rows * r.columns)
        assert r.name.startswith(f"{prefix}.{r.block}.")
        assert r.damp == 0.01
        assert 2 < r.bits_per_weight < 9  # 2 and, at this size, large overheads
        assert 0 < r.proxy_loss < 1
        assert r.seconds > 0
    assert [r.block for r in records] == sorted(r.block for r in records)


def test_what_is_not_quantized_keeps_the_dtype_of_the_model():
    model, _ = quantized("llama", recipe(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_the_batch_size_does_not_matter(name):
    # float64, where the order of sums cannot push a weight over the edge between two levels
    models = [
        quantized(name, recipe(), batch_size=size, dtype=torch.float64)[0] for size in (1, 3, 7)
    ]
    for other in models[1:]:
        torch.testing.assert_close(other.state_dict(), models[0].state_dict())


def test_one_seed_gives_the_same_weights_bitwise_and_another_seed_others():
    first, again, other = (quantized("opt", recipe(), seed=seed)[0] for seed in (0, 0, 1))
    plain = [quantized("opt", recipe(incoherent=False), seed=seed)[0] for seed in (0, 1)]
    for matrix in coverage(tiny("opt")).quantized:
        codes = [model.get_submodule(matrix).codes for model in (first, again, other)]
        assert torch.equal(codes[0], codes[1])
        assert not torch.equal(codes[0], codes[2])
        assert torch.equal(*(model.get_submodule(matrix).codes for model in plain))


def test_the_stages_are_timed():
    watch = Stopwatch()
    run = Run(recipe=recipe(), device="cpu", seed=0, watch=watch)
    records = quantize_matrix_by_matrix(tiny("opt"), tokens(), run)
    total = sum(record.seconds for record in records)
    assert list(watch.seconds) == ["replay", "observe", "quantize"]
    assert 0 < total < watch.seconds["quantize"]


def test_a_stopwatch_counts_a_stage_that_fails():
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch("work"):
        raise ZeroDivisionError
    assert watch.seconds["work"] > 0


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_matrices_that_are_fed_alike_share_one_hessian_and_its_factors(name, monkeypatch):
    made: list[int] = []

    class Counted(observe.Hessian):
        def __init__(self, n: int, **options) -> None:
            made.append(n)
            super().__init__(n, **options)

    monkeypatch.setattr(observe, "Hessian", Counted)
    factored: list[int] = []
    plain = recipe(incoherent=False)

    def feedback(H: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        factored.append(len(H))
        return plain.feedback(H, dim)

    quantized(name, replace(plain, feedback=feedback))
    assert made == factored  # q, k and v; out; up (and gate); down
    assert len(made) == 4 * 4


@pytest.mark.parametrize(
    ("name", "quant"), [("opt", "ldlq"), ("opt-350m", "gptq"), ("llama", "ldlqRG")]
)
def test_the_recorded_loss_is_that_of_the_weights_on_the_inputs_that_they_saw(name, quant):
    how = recipe(3, quant=quant)
    after, records = quantized(name, how)
    losses = {record.name: record.proxy_loss for record in records}
    model, (prefix, blocks) = tiny(name), find_blocks(after)
    for index in range(len(blocks)):  # those before are quantized, itself and those after not
        inputs = collect_inputs(model, f"{prefix}.{index}.")
        for matrix, x in inputs.items():
            W = model.get_submodule(matrix).weight.detach().double()
            E = after.get_submodule(matrix).dequantize().double() - W
            expected = (E @ x.T).square().sum() / (W @ x.T).square().sum()
            assert losses.pop(matrix) == pytest.approx(float(expected), rel=1e-4)  # float32 sums
        model.get_submodule(prefix)[index] = blocks[index]
    assert not losses


def collect_inputs(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The inputs of each matrix below a name in a run of the whole model, one row a token."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: seen.update({name: args[0].flatten(0, -2).double()})

    hooks = [
        module.register_forward_pre_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
    ]
    logits(model, len(tokens()))
    for hook in hooks:
        hook.remove()
    return seen


def test_each_record_comes_when_its_matrix_is_in_place():
    model, before = tiny("opt"), tiny("opt").state_dict()
    run = Run(recipe=recipe(), device="cpu", seed=0)
    records = quantize_matrix_by_matrix(model, tokens(), run)
    first = next(records)
    assert before.keys() - model.state_dict().keys() == {f"{first.name}.weight"}


def test_each_matrix_is_logged_on_one_line_and_raised_damping_is_a_warning(caplog):
    caplog.set_level(logging.INFO, logger="quip.model.work")
    how = replace(recipe(incoherent=False), damp=0.0)
    model = tiny("opt")
    records = quantize_model(model, tokens(1), how, device="cpu", seed=0)  # 12 tokens: rank 12
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert len(lines) == len(records)
    for line, record in zip(lines, records, strict=True):
        assert line.startswith(f"{record.name}: {record.bits_per_weight:.3f} bits, proxy loss")
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    raised = [record for record in records if record.damp > 0]
    assert raised
    assert len(warnings) == len(raised)
    assert f"{raised[0].name}: not positive definite with damping 0; used 0.001" in warnings
