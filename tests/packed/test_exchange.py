"""A packed matrix in place of a Conv1D, and a Conv1D in place of it again."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quip.errors import Unavailable
from quip.jobs.export import export_dense
from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.packed.checkpoint import load, to_dense
from quip.packed.exchange import replace
from quip.packed.layout import Layout
from quip.packed.linear import QuantizedLinear, quantized_layers
from quip.packed.stack import Stack, StackedLinear
from tests.laws import assert_near
from tests.support.checkpoints import INCOHERENT, edit, refusals, save
from tests.support.tiny import VOCAB, logits

SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": VOCAB}
C = "transformer.h.0.mlp.c_fc"


def gpt2() -> PreTrainedModel:
    config = hf.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return model


@pytest.fixture(scope="module")
def packed() -> PreTrainedModel:
    """A GPT-2 of which the matrices of both blocks are packed."""
    model, recipe = gpt2(), build_recipe(**INCOHERENT)
    for name, old in [*model.named_modules()]:
        if isinstance(old, Conv1D):
            W, rng = old.weight.T.contiguous(), torch.Generator().manual_seed(0)
            H = torch.eye(old.nx, dtype=torch.float64)
            layer = QuantizedLinear.from_matrix(quantize_matrix(W, H, recipe, rng=rng), old.bias)
            replace(model, name, layer)
    return model


@pytest.fixture(scope="module")
def saved(packed, tmp_path_factory) -> Path:
    return save(packed, tmp_path_factory.mktemp("conv1d") / "gpt2")


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_a_gpt2_is_saved_and_loaded_bit_for_bit(packed, saved):
    assert len(quantized_layers(packed)) == 8
    loaded = load(saved)
    assert torch.equal(logits(loaded), logits(packed))
    assert Layout.of(loaded) == Layout.of(packed)
    layer = loaded.get_submodule(C)
    assert (layer.in_features, layer.out_features) == (32, 128)


def test_what_is_exported_is_a_gpt2_of_conv1d_again(saved, tmp_path):
    expected = logits(load(saved))
    export_dense(saved, tmp_path / "dense")
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    assert classes(found) == classes(gpt2())
    assert_near(logits(found), expected, 1e-5)  # the same products in another order


def test_a_model_that_was_never_saved_goes_back_too(packed):
    model = copy.deepcopy(packed)
    assert_near(logits(to_dense(model)), logits(packed), 1e-5)
    assert classes(model) == classes(gpt2())


def test_a_stack_in_place_of_conv1d_goes_back(packed):
    model = gpt2()
    names = ("transformer.h.0.attn.c_attn", C)
    spec = packed.get_submodule(C).spec
    Layout({}, {names: spec}).make_room(model)
    members = [model.get_submodule(name) for name in names]
    assert [type(x) for x in members] == [StackedLinear] * 2
    assert [x.out_features for x in members] == [96, 128]
    assert all(x.is_conv1d for x in members)
    assert isinstance(members[0].whole, Stack)


def test_a_conv1d_that_reads_other_inputs_is_no_member_of_a_stack(packed):
    names = ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj")
    with pytest.raises(Unavailable, match=r"they read inputs of \[32, 128\] numbers"):
        Layout({}, {names: packed.get_submodule(C).spec}).make_room(gpt2())


def test_a_norm_of_a_gpt2_is_refused(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    words = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, modules=[*words["modules"], "transformer.h.0.ln_1"])
    assert "but in a GPT2LMHeadModel it is a LayerNorm" in refusals(folder)
