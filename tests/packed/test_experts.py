"""Experts apart: what they compute, where their matrices are, and the way back."""

import copy
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from quip.errors import UnsupportedModel
from quip.packed import experts as module
from quip.packed.experts import Expert, Experts, fuse, is_fused, unfuse
from quip.packed.linear import QuantizedLinear
from quip.packed.parts import Parts
from tests.support.checkpoints import INCOHERENT
from tests.support.mixtures import MIXTURES, mixture, packed
from tests.support.tiny import logits


@torch.no_grad()
def one_token(model: nn.Module) -> torch.Tensor:
    return model(input_ids=torch.tensor([[3]])).logits


def experts_of(model: nn.Module) -> dict[str, Experts]:
    return {name: x for name, x in model.named_modules() if isinstance(x, Experts)}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_compute_what_eager_does_bit_for_bit(name, dtype):
    if (name, dtype) == ("nemotron-h", torch.bfloat16):
        pytest.skip("its eager sums in the type of the router; the default and ours do not")
    model = mixture(name, dtype=dtype)
    expected, alone = logits(model, 7), one_token(model)
    before = model.state_dict()
    unfuse(model)
    assert experts_of(model)
    assert not any(is_fused(module) for module in model.modules())
    assert torch.equal(logits(model, 7), expected)
    assert torch.equal(one_token(model), alone)
    assert torch.equal(logits(copy.deepcopy(model), 7), expected)
    fuse(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(x, before[key]) for key, x in after.items())
    assert torch.equal(logits(model, 7), expected)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_weights_are_views_of_the_fused_parameters(name):
    model = mixture(name)
    whole = model.model.layers[0].mlp.experts.gate_up_proj
    unfuse(model)
    experts = model.model.layers[0].mlp.experts
    for index in range(len(experts)):
        held = experts[index].gate_up_proj.weight
        own = whole[index].T if name == "gpt-oss" else whole[index]
        assert torch.equal(held, own)
        assert held.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama-4"])
def test_matrices_that_are_read_again_compute_the_same_numbers(name):
    model = mixture(name)
    unfuse(model)
    expected, held = logits(model, 7), model.state_dict()
    rows = {key: x.contiguous().clone() for key, x in held.items()}  # as a file holds them
    model.load_state_dict(rows, assign=True)
    assert torch.equal(logits(model, 7), expected)
    assert {k: x.stride() for k, x in model.state_dict().items()} == {
        k: x.stride() for k, x in held.items()
    }


def test_names_of_matrices_are_those_of_numbered_children():
    model = mixture("mixtral")
    unfuse(model)
    names = [name for name, x in model.named_modules() if isinstance(x, nn.Linear)]
    assert "model.layers.1.mlp.experts.3.gate_up_proj" in names
    assert "model.layers.1.mlp.experts.3.down_proj" in names
    assert "model.layers.1.mlp.gate.weight" in model.state_dict()


def test_to_unfuse_twice_is_to_unfuse_once():
    model = mixture("mixtral")
    unfuse(model)
    first = [*model.modules()]
    unfuse(model)
    assert [*map(id, model.modules())] == [*map(id, first)]


def test_only_experts_with_tokens_run_and_each_runs_once():
    model = mixture("mixtral")
    unfuse(model)
    experts, ran = model.model.layers[0].mlp.experts, []
    for index in range(len(experts)):
        experts[index].down_proj.register_forward_pre_hook(
            lambda _, args, index=index: ran.append((index, len(args[0])))
        )
    index = torch.tensor([[3, 0], [3, 2], [0, 3]])
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    experts(hidden, index, torch.ones(3, 2))
    assert ran == [(0, 2), (2, 1), (3, 3)]


def test_active_yields_rows_slot_by_slot():
    model = mixture("mixtral")
    unfuse(model)
    found = model.model.layers[0].mlp.experts.active(torch.tensor([[3, 0], [1, 3], [3, 1]]))
    assert [(e, rows.tolist(), slots.tolist()) for e, rows, slots in found] == [
        (0, [0], [1]),
        (1, [1, 2], [0, 1]),
        (3, [0, 2, 1], [0, 0, 1]),
    ]


def test_experts_on_the_meta_device_have_their_sizes():
    with torch.device("meta"):
        model = type(mixture("qwen3-moe"))(MIXTURES["qwen3-moe"]())
    unfuse(model)
    down = model.model.layers[0].mlp.experts[2].down_proj
    assert (down.in_features, down.out_features, down.weight.is_meta) == (24, 32, True)


def test_experts_of_which_one_is_no_plain_matrix_stay_apart():
    model = mixture("mixtral")
    unfuse(model)
    model.model.layers[0].mlp.experts[1].down_proj = nn.Identity()
    fuse(model)
    assert [*experts_of(model)] == ["model.layers.0.mlp.experts"]


def test_a_module_that_holds_more_than_matrices_of_experts_stays_as_it_is():
    model = mixture("mixtral")
    fused = model.model.layers[0].mlp.experts
    fused.scale = nn.Parameter(torch.ones(3))
    unfuse(model)
    assert model.model.layers[0].mlp.experts is fused
    assert isinstance(model.model.layers[1].mlp.experts[0], Expert)


def test_a_model_of_more_experts_than_any_has_is_left_alone(monkeypatch):
    model = mixture("mixtral")
    monkeypatch.setattr(module, "MOST", 7)
    with pytest.raises(UnsupportedModel, match="its layers have 8 experts together, and models of"):
        unfuse(model)
    assert not experts_of(model)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "nemotron-h"])
def test_packed_experts_are_multiplied_once_each_whatever_their_tokens(name, monkeypatch):
    model = packed(mixture(name), INCOHERENT, lambda name: ".experts." in name)
    (experts, *_), seen, multiply = experts_of(model).values(), [], Parts.multiply

    def watched(self, x, codes):
        seen.append(len(x))
        return multiply(self, x, codes)

    monkeypatch.setattr(Parts, "multiply", watched)
    rng = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(9, 32, generator=rng), torch.rand(9, 2, generator=rng)
    index = torch.tensor([[3, 0]] * 8 + [[0, 1]])
    found = experts(hidden, index, weights)
    assert seen == [9, 9, 1, 1, 8, 8]
    for matrix in [x for x in experts.modules() if isinstance(x, QuantizedLinear)]:
        matrix.forward = matrix.to_linear().forward
    torch.testing.assert_close(found, experts(hidden, index, weights))


class Anything(SimpleNamespace):
    """A config of whatever an experts module asks for."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "_experts_implementation":
            return "eager"
        if name == "moe_latent_size":
            return None
        known = {"experts": 4, "hidden_size": 32, "intermediate": 24, "act": "silu"}
        return next((value for part, value in known.items() if part in name), 1.5)


DECORATED = re.compile(r"@use_experts_implementation.*\nclass (\w+)")
WIDER = {"OpenAIPrivacyFilterExperts"}  # it computes in float32, whatever its dtype


@pytest.mark.slow
@torch.no_grad()
def test_every_class_of_transformers_with_such_experts_is_computed_bit_for_bit():
    torch.manual_seed(0)
    found: list[str] = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in DECORATED.findall(path.read_text()):
            home = import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            fused = getattr(home, name)(Anything())
            for parameter in fused.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
            assert is_fused(fused), name
            found.append(name)
            for dtype in (torch.float32, torch.bfloat16):
                x, weights = torch.randn(7, 32, dtype=dtype), torch.rand(7, 2, dtype=dtype)
                index = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
                expected = fused.to(dtype)(x, index, weights)
                same = torch.equal(Experts(fused)(x, index, weights), expected)
                assert same or (name in WIDER and dtype == torch.bfloat16), name
    assert len(found) > 60
