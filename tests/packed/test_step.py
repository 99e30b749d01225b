"""A decoding step with fixed inputs: what a CUDA graph would hold, computed without one."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from quip.kernels import centroid_matvec, grid_matvec, lattice_matvec
from quip.kernels.hadamard.rotations import turn
from quip.packed import step as module
from quip.packed.experts import unfuse
from quip.packed.step import Step, fixed_step
from tests.laws import assert_near
from tests.support.checkpoints import INCOHERENT, SHARP, VECTORS, quantized
from tests.support.mixtures import mixture
from tests.support.tiny import EAGER_ONLY, tiny, tokens

PROMPT, TEXTS = 4, 2
RECIPES = {
    "int": INCOHERENT,
    "E8P": SHARP,
    "2D": VECTORS["2D"],
    "groups": {"wbits": 4, "groupsize": 16, "quant": "nearest"},
}
NOISE = 1e-5  # of float32: what a cache has room for is masked, and sums add in another order


def capture(compute: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """As a graph: nothing is computed yet, and each time the result is in the same tensor."""
    results: list[Tensor] = []

    def replay() -> Tensor:
        result = compute()
        results[:] = [results[0].copy_(result) if results else result]
        return results[0]

    return replay


@pytest.fixture(autouse=True)
def captured(monkeypatch) -> list[torch.device]:
    """Steps on a CPU are captured too, and how often is seen."""
    seen: list[torch.device] = []
    monkeypatch.setitem(
        module.CAPTURES,
        "cpu",
        lambda compute, device: seen.append(device) or capture(compute, device),
    )
    module._say_without.cache_clear()
    return seen


def begun(model: PreTrainedModel, left: int = 8) -> tuple[Step | None, Tensor]:
    """A step after the prompt, and the logits of the tokens that follow as the model has them."""
    ids = tokens(TEXTS)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        cache = model(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values
    return fixed_step(model, cache, left), expected


def run(step: Step) -> list[Tensor]:
    return [step(column[:, None]).clone() for column in tokens(TEXTS)[:, PROMPT:].T]


def assert_steps(model: PreTrainedModel) -> None:
    step, expected = begun(model)
    assert step is not None
    assert_near(torch.stack(run(step), dim=1), expected[:, PROMPT:].float(), NOISE)
    assert step.captured


@pytest.mark.parametrize("name", ["opt", "llama", "gpt-neox", "phi", "gptj"])
def test_steps_predict_what_the_model_predicts(name, captured):
    assert_steps(tiny(name, "eager" if name in EAGER_ONLY else "sdpa"))
    assert captured == [torch.device("cpu")]


@pytest.fixture(scope="module", params=RECIPES)
def packed(request) -> PreTrainedModel:
    return quantized("llama", RECIPES[request.param], blocks=1)


def test_steps_of_a_packed_model_predict_what_it_predicts(packed):
    assert_steps(packed)


def test_a_cache_that_is_full_makes_room_for_twice_as_many_tokens(monkeypatch, captured):
    monkeypatch.setattr(module, "ROOM", 1)
    monkeypatch.setattr(module, "ALIGNED", 1)
    model = tiny("llama", "sdpa")
    for left, rooms in ((8, [8, 12]), (100, [8, 16])):
        step, expected = begun(model, left)
        assert step._room == rooms[0]
        found = run(step)
        assert step._room == rooms[1]
        assert_near(torch.stack(found, dim=1), expected[:, PROMPT:], NOISE)
    assert len(captured) == 4
    monkeypatch.setattr(module, "ALIGNED", 6)
    assert begun(model)[0]._room == 12


class Unwaited(TorchDispatchMode):
    """Fails where the host would wait for a device, or send it a number: no graph holds that."""

    WAITS = ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "repeat_interleave")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket._qualified_op_name.split("::")[1] not in self.WAITS, func
        return func(*args, **(kwargs or {}))


def test_no_step_but_the_first_waits_for_the_device(packed, monkeypatch):
    for operation in (
        grid_matvec.multiply,
        lattice_matvec.multiply,
        centroid_matvec.multiply,
        turn,
    ):
        monkeypatch.setattr(operation, "forms", {})  # what is computed in torch on a device
    step, _ = begun(packed)
    column = tokens(TEXTS)[:, :1]
    step(column)
    with Unwaited():
        step(column)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            column.sum().item()


def test_where_nothing_can_be_captured_steps_go_on_and_a_line_says_so(monkeypatch, caplog):
    def fail(compute, device):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setitem(module.CAPTURES, "cpu", fail)
    with caplog.at_level(logging.WARNING, "quip"):
        for _ in range(2):
            step, expected = begun(tiny("llama", "sdpa"))
            assert_near(torch.stack(run(step), dim=1), expected[:, PROMPT:], NOISE)
            assert not step.captured
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "tokens are computed without a CUDA graph, more slowly"
    ]
    assert "\n" not in caplog.messages[0]


def test_no_room_for_a_second_cache_is_no_error(monkeypatch, caplog):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "__init__", fail)
    assert begun(tiny("llama", "sdpa"))[0] is None
    assert "CUDA out of memory" in caplog.messages[0]


@pytest.mark.parametrize("name", ["mistral", "gemma2", "qwen2", "bloom"])
def test_caches_that_slide_and_positions_that_are_not_said_are_left_to_the_model(name):
    assert begun(tiny(name))[0] is None


def test_a_graph_is_not_made_for_a_few_tokens_in_training_or_on_a_host(monkeypatch):
    model = tiny("llama", "sdpa")
    assert begun(model, left=module.FEWEST - 1)[0] is None
    assert begun(model.train())[0] is None
    monkeypatch.delitem(module.CAPTURES, "cpu")
    assert begun(model.eval())[0] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_on_a_device_predicts_what_the_model_predicts(packed, caplog):
    model = copy.deepcopy(packed).to("cuda")
    ids = tokens(TEXTS).to("cuda")
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        cache = model(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values
    step = fixed_step(model, cache, module.FEWEST)
    found = [step(column[:, None]).clone() for column in ids[:, PROMPT:].T]
    assert not caplog.records
    assert_near(torch.stack(found, dim=1), expected[:, PROMPT:], 1e-3)  # x in 16 to 24 bits


def test_a_mixture_of_which_other_experts_run_each_time_is_left_to_the_model():
    model = mixture("mixtral")
    assert begun(model)[0] is not None
    unfuse(model)
    assert begun(model)[0] is None
