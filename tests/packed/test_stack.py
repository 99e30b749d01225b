"""Stacks: q, k and v, and up and gate, quantized as one and answering together."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from quip.errors import Unavailable
from quip.jobs.inspect import inspect_checkpoint
from quip.matrix.build import build_recipe
from quip.matrix.linalg import proxy_loss
from quip.model.quantize import quantize_model
from quip.packed.checkpoint import load, to_dense
from quip.packed.layout import Layout
from quip.packed.linear import quantized_layers
from quip.packed.stack import Stack, StackedLinear, in_order, stacked, stacks
from tests.support.checkpoints import VECTORS, damage, edit, quantized, refusals, save
from tests.support.tiny import logits, tiny, tokens

SHARP = {"codebook": "E8P12"}
STACKED = {name: {"codebook": name} for name in ("E8P12", "E8P12RVQ3B", "E8P12RVQ4B")} | VECTORS
Q, K, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")


@pytest.fixture
def model():
    return quantized("llama", SHARP, blocks=1)


def members(model: nn.Module) -> dict[str, StackedLinear]:
    return {name: member for members in stacks(model) for name, member in members.items()}


def test_matrices_of_the_same_inputs_become_one(model):
    up, gate = (f"model.layers.0.mlp.{x}_proj" for x in ("up", "gate"))
    assert [list(names) for names in stacks(model)] == [[Q, K, V], [up, gate]]
    assert set(quantized_layers(model)) == {
        f"{Q}.stack",
        f"{up}.stack",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
    }
    assert quantized_layers(model)[f"{Q}.stack"].codes.shape[0] == 32 + 16 + 16


def test_no_fuse_leaves_them_apart():
    model = quantized("llama", SHARP | {"no_fuse": True}, blocks=1)
    assert not stacks(model)
    assert len(quantized_layers(model)) == 7


@pytest.mark.parametrize(
    "flags", [SHARP, {"codebook": "E8P12RVQ3B", "pre_rescale": True}, *VECTORS.values()]
)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_answers_are_those_of_the_dense_rows(name, flags):
    model = quantized(name, flags, blocks=1)
    rng = torch.Generator().manual_seed(3)
    for members in stacks(model):
        width = next(iter(members.values())).in_features
        for count in (1, 100):  # activations, then weights, go through the transform
            x = torch.randn(count, width, generator=rng)
            for member in members.values():
                expected = nn.functional.linear(x, member.dequantize(), member.bias)
                torch.testing.assert_close(member(x), expected, rtol=1e-4, atol=1e-4)


def test_the_records_tell_of_each_matrix(tmp_path):
    model, weights = tiny("llama"), tiny("llama").state_dict()
    records = quantize_model(model, tokens(), build_recipe(**SHARP), device="cpu", seed=0)
    assert {r.name for r in records} == {
        name.removesuffix(".weight") for name in weights if ".layers." in name and "proj" in name
    }
    stored = sum(r.bits_per_weight * r.rows * r.columns for r in records)
    layers = quantized_layers(model).values()
    assert round(stored) == sum(8 * x.nbytes for q in layers for x in q.stored().values())
    H = torch.eye(32).double()
    for name, member in members(model).items():
        record = next(r for r in records if r.name == name)
        assert (record.rows, record.columns) == (member.out_features, member.in_features)
        assert 0 < proxy_loss(weights[f"{name}.weight"], member.dequantize(), H) < 0.5
        assert 0 < record.proxy_loss < 0.5


def test_one_product_serves_all_members(model, monkeypatch):
    calls = []
    product = Stack.product
    monkeypatch.setattr(Stack, "product", lambda self, *a: calls.append(1) or product(self, *a))
    found = logits(model)
    assert len(calls) == 2
    q, k, v = (model.get_submodule(name) for name in (Q, K, V))
    x, y = torch.randn(2, 3, 32)
    first = [m(x) for m in (v, q, k)]  # in any order
    assert len(calls) == 3
    assert q.stack.answers.kept is None
    assert torch.equal(q(x), first[1])  # a second question is a second product
    assert len(calls) == 4
    assert not torch.equal(k(y), first[2])
    assert len(calls) == 5
    x.add_(1)  # the same tensor, but not the same numbers
    assert not torch.equal(q(x), first[1])
    assert torch.equal(logits(model), found)


def test_an_answer_does_not_outlive_its_question(model):
    q = model.get_submodule(Q)
    x = torch.randn(3, 32)
    q(x)
    assert set(q.stack.answers.kept[2]) == {1, 2}
    del x
    gc.collect()
    assert q.stack.answers.kept is None


def test_threads_do_not_take_the_answers_of_others(model):
    three = [model.get_submodule(name) for name in (Q, K, V)]
    inputs = torch.randn(3, 2, 32)
    expected = [[member(x) for member in three] for x in inputs]

    def ask(i: int) -> bool:
        x = inputs[i]
        return all(
            torch.equal(member(x), y)
            for _ in range(300)
            for member, y in zip(three, expected[i], strict=True)
        )

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(ask, range(3)))


def test_an_answer_without_gradients_is_not_given_where_they_are_asked_for(model):
    q, k = model.get_submodule(Q), model.get_submodule(K)
    x = torch.randn(3, 32, requires_grad=True)
    with torch.no_grad():
        q(x)
    k(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode], ids=["plain", "inference"])
def test_copies_and_pickles_share_a_stack_of_their_own(model, mode):
    with mode():
        expected = logits(model)
        model.get_submodule(Q)(torch.randn(3, 32))  # answers for k and v are waiting
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        q, k = made.get_submodule(Q), made.get_submodule(K)
        assert q.whole is k.whole is q.stack
        assert q.whole is not model.get_submodule(Q).whole
        assert torch.equal(logits(made), expected)


@pytest.mark.parametrize("flags", [SHARP, *VECTORS.values()])
def test_casts_leave_what_is_stored_alone(flags):
    model = quantized("llama", flags, blocks=1)
    before = {name: x.clone() for name, x in model.get_submodule(f"{Q}.stack").stored().items()}
    stack = model.bfloat16().get_submodule(f"{Q}.stack")
    assert all(torch.equal(x, before[name]) for name, x in stack.stored().items())
    assert stack.scales.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codebook", STACKED)
@pytest.mark.parametrize("name", ["opt", "llama", "qwen2"])
def test_a_model_with_stacks_comes_back_bitwise(name, codebook, dtype, tmp_path):
    model = quantized(name, STACKED[codebook], blocks=1, dtype=dtype)
    assert len(stacks(model)) == (1 if name == "opt" else 2)
    loaded = load(save(model, tmp_path / "model"))
    assert torch.equal(logits(loaded), logits(model))
    assert Layout.of(loaded) == Layout.of(model)
    found = inspect_checkpoint(tmp_path / "model")
    assert found["quantized_matrices"] == len(Layout.of(model).names)
    stored = sum(x.nbytes for q in quantized_layers(model).values() for x in q.stored().values())
    assert found["bits_per_weight"] == 8 * stored / found["quantized_weights"]
    dense = to_dense(loaded)
    assert not stacks(dense)
    assert not quantized_layers(dense)
    if dtype == torch.float32:  # in bfloat16 the order of roundings decides
        torch.testing.assert_close(logits(dense), logits(model), rtol=0, atol=1e-4)


def test_a_stack_that_does_not_fit_is_refused_in_a_line(model, tmp_path):
    folder = save(model, tmp_path / "model")
    down = "model.layers.0.mlp.down_proj"
    edit(folder, stacks=[[Q, down]], modules=[])
    assert "are one stack, but they read inputs of [32, 48] numbers" in refusals(folder)
    edit(folder, stacks=[3])
    assert "is damaged (stacks[0] is 3, not a list)" in refusals(folder)
    edit(folder, stacks=[[Q, K, "model.zork"]])
    assert "model.zork is a quantized matrix, but" in refusals(folder)


def test_a_scale_that_is_none_is_refused(model, tmp_path):
    folder = save(model, tmp_path / "model")
    damage(folder, lambda tensors: tensors[f"{Q}.stack.scales"].fill_(torch.nan))
    assert "a scale of the stack is not a positive number" in refusals(folder)


def test_the_scales_make_the_parts_alike(rng):
    weights = {"a": torch.randn(4, 8), "b": 100 * torch.randn(3, 8), "c": torch.zeros(2, 8)}
    W, scales = stacked(weights)
    assert torch.equal(scales, scales.half().float())  # files of 16 bits hold them
    size = torch.cat([*weights.values()]).square().mean().sqrt()
    a, b, c = W.split([4, 3, 2])
    for part in (a, b):
        assert float(part.square().mean().sqrt() / size) == pytest.approx(1, abs=2**-8)
    assert torch.equal(c, weights["c"])
    assert scales[2] == 1
    torch.testing.assert_close(b * scales[1], weights["b"])


def test_published_names_are_stacked_as_published():
    assert in_order(["x.k_proj", "x.v_proj", "x.q_proj"]) == ["x.q_proj", "x.k_proj", "x.v_proj"]
    assert in_order(["x.gate_proj", "x.up_proj"]) == ["x.up_proj", "x.gate_proj"]
    assert in_order(["x.w3", "x.w1"]) == ["x.w3", "x.w1"]


def test_members_of_another_width_make_no_stack():
    layout = Layout.of(quantized("llama", SHARP, blocks=1))
    other = {"a": nn.Linear(8, 8), "b": nn.Linear(16, 8)}
    model = nn.ModuleDict(other)
    with pytest.raises(Unavailable, match="a, b are one stack"):
        Layout({}, {("a", "b"): layout.specs[0]}).make_room(model)
