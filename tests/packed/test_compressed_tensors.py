"""Folders of compressed-tensors, as llm-compressor writes them: every weight comes as it was."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quip.packed.checkpoint import load
from quip.packed.compressed_tensors.read import import_compressed_tensors
from quip.packed.linear import quantized_layers
from tests.support.integers import write_ct
from tests.support.tiny import tokens

pytestmark = pytest.mark.usefixtures("command")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits.double()


def check_same(folder: Path, dense: PreTrainedModel) -> PreTrainedModel:
    """What is imported of a folder has the weights of the model, bit for bit, and its logits."""
    assert import_compressed_tensors(folder, folder.parent / "ours").matrices == 7
    model = load(folder.parent / "ours", dtype="float32")
    for name, layer in quantized_layers(model).items():
        # Products of scales of 16 bits fit float32; those of float32 are rounded to it everywhere.
        assert torch.equal(layer.dequantize(), dense.get_submodule(name).weight.float()), name
    wanted = logits(dense)
    error = (logits(model) - wanted).abs().max()
    assert error < 1e-4 * wanted.abs().max()  # ours are sums of float32, of large weights
    return model


@pytest.mark.parametrize(
    ("bits", "sym", "dense"),
    [
        *((bits, bits % 2 == 0, True) for bits in range(2, 9)),
        *((bits, bits % 2 == 1, False) for bits in (3, 4, 5, 6, 7)),  # as version 0.17 has it
        (3, True, True),
    ],
)
def test_weights_stay_bit_for_bit(tmp_path, bits, sym, dense):
    wanted = write_ct(tmp_path / "theirs", bits=bits, sym=sym, dense=dense)
    model = check_same(tmp_path / "theirs", wanted)
    assert model.get_submodule(Q_PROJ).spec.codebook == {
        "kind": "grid",
        "bits": bits,
        "group": 32,
        "symmetric": "signed" if sym else False,
    }


@pytest.mark.parametrize(
    ("dtype", "group"), [(torch.float16, None), (torch.float16, 16), (torch.float32, 16)]
)
def test_scales_of_any_type_are_kept(tmp_path, dtype, group):
    wanted = write_ct(tmp_path / "theirs", bits=3, group=group, dtype=dtype)
    model = check_same(tmp_path / "theirs", wanted)
    steps = model.get_submodule(Q_PROJ).step
    assert (steps.dtype, steps.shape) == (dtype, (64, 64 // (group or 64)))


@pytest.mark.parametrize("sym", [True, False])
def test_inputs_whose_groups_lie_scattered_are_put_in_order(tmp_path, sym):
    wanted = write_ct(tmp_path / "theirs", sym=sym, scattered=True)
    model = check_same(tmp_path / "theirs", wanted)
    assert [part["kind"] for part in model.get_submodule(Q_PROJ).spec.transforms] == ["order"]


def test_matrices_may_be_of_several_schemes(tmp_path):
    schemes = {"q_proj": (8, None, True), "down_proj": (3, 48, False), "o_proj": (4, 32, False)}
    wanted = write_ct(tmp_path / "theirs", sym=True, schemes=schemes)
    model = check_same(tmp_path / "theirs", wanted)
    found = {key.rpartition(".")[2]: x.spec.codebook for key, x in quantized_layers(model).items()}
    assert [found[name]["bits"] for name in ("q_proj", "down_proj", "o_proj", "up_proj")] == [
        *(8, 3, 4, 4)
    ]
    assert [found[name]["symmetric"] for name in ("q_proj", "down_proj", "o_proj", "up_proj")] == [
        *("signed", False, False, "signed")
    ]


def test_biases_and_dense_matrices_stay(tmp_path):
    wanted = write_ct(tmp_path / "theirs", "qwen2")
    model = check_same(tmp_path / "theirs", wanted)
    assert torch.equal(model.get_submodule(Q_PROJ).bias.double(), wanted.get_submodule(Q_PROJ).bias)
