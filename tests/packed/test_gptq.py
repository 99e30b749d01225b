"""Folders of GPTQ, as AutoGPTQ and GPTQModel write them: every weight comes over as it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from quip.jobs.export import export_dense
from quip.jobs.inspect import inspect_checkpoint
from quip.packed.checkpoint import load
from quip.packed.gptq.read import import_gptq
from quip.packed.linear import quantized_layers
from tests.support.damage import change
from tests.support.integers import write_gptq
from tests.support.tiny import tokens

pytestmark = pytest.mark.usefixtures("command")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits.double()


def check_same(folder: Path, dense: PreTrainedModel, count: int = 7) -> PreTrainedModel:
    """What is imported of a folder has the weights of the model, bit for bit, and its logits."""
    assert import_gptq(folder, folder.parent / "ours").matrices == count
    model = load(folder.parent / "ours", dtype="float32")
    assert len(quantized_layers(model)) == count
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.dequantize().double(), dense.get_submodule(name).weight), name
    wanted = logits(dense)
    error = (logits(model) - wanted).abs().max()
    assert error < 1e-4 * wanted.abs().max()  # ours are sums of float32, of large weights
    return model


@pytest.mark.parametrize(("bits", "version"), [(2, 1), (3, 1), (4, 1), (8, 1), (3, 2), (4, 2)])
def test_weights_stay_bit_for_bit(tmp_path, bits, version):
    dense = write_gptq(tmp_path / "theirs", bits=bits, version=version)
    model = check_same(tmp_path / "theirs", dense)
    words = model.get_submodule(Q_PROJ).spec.codebook
    assert words == {
        "kind": "grid",
        "bits": bits,
        "group": 32,
        "symmetric": False,
        "steps": "float16",
    }


@pytest.mark.parametrize(  # of 40, the last one is short
    ("group", "sym"), [(None, True), (None, False), (64, True), (40, True), (40, False)]
)
def test_groups_of_any_size_are_read(tmp_path, group, sym):
    dense = write_gptq(tmp_path / "theirs", group=group, sym=sym)
    model = check_same(tmp_path / "theirs", dense)
    words = model.get_submodule(Q_PROJ).spec.codebook
    assert (words["group"], words["symmetric"]) == (group, "signed" if sym else False)


@pytest.mark.parametrize("group", [32, 40, None])
def test_inputs_whose_groups_lie_scattered_are_put_in_order(tmp_path, group):
    dense = write_gptq(tmp_path / "theirs", group=group, scattered=True)
    model = check_same(tmp_path / "theirs", dense)
    kinds = [part["kind"] for part in model.get_submodule(Q_PROJ).spec.transforms]
    assert kinds == ([] if group is None else ["order"])
    change(tmp_path / "theirs", lambda x: [x.pop(k) for k in list(x) if k.endswith("g_idx")])
    import_gptq(tmp_path / "theirs", tmp_path / "ours", overwrite=True)
    again = load(tmp_path / "ours")
    assert not again.get_submodule(Q_PROJ).spec.transforms  # as the files then say


def test_weights_are_those_that_the_format_multiplies_out(tmp_path):
    """scale (code - zero) in float16, as its programs have it."""
    write_gptq(tmp_path / "theirs")
    import_gptq(tmp_path / "theirs", tmp_path / "ours")
    held = load_file(tmp_path / "theirs" / "model.safetensors")
    words = held[f"{Q_PROJ}.qweight"].T.numpy().astype("int64")
    codes = torch.tensor([[w >> 4 * j & 15 for w in row for j in range(8)] for row in words])
    zeros = held[f"{Q_PROJ}.qzeros"].numpy().astype("int64")
    zero = torch.tensor(
        [[(w >> 4 * j & 15) + 1 & 15 for w in row for j in range(8)] for row in zeros]
    )
    place = held[f"{Q_PROJ}.g_idx"].long()
    theirs = held[f"{Q_PROJ}.scales"].T[:, place] * (codes - zero.T[:, place]).half()
    assert theirs.dtype == torch.float16
    found = load(tmp_path / "ours").get_submodule(Q_PROJ).dequantize()
    assert torch.equal(found.half(), theirs)


def test_scales_that_bfloat16_holds_are_kept_in_it(tmp_path):
    dense = write_gptq(tmp_path / "theirs", dtype=torch.bfloat16)
    change(
        tmp_path / "theirs", lambda x: x.update({f"{Q_PROJ}.scales": x[f"{Q_PROJ}.scales"].half()})
    )
    model = check_same(tmp_path / "theirs", dense)
    assert all("steps" not in x.spec.codebook for x in quantized_layers(model).values())


@pytest.mark.parametrize("sym", [True, False])
def test_scales_below_zero_and_of_zero_are_weights_too(tmp_path, sym):
    """AutoRound makes the first, and a group of zeros has the second."""
    dense = write_gptq(tmp_path / "theirs", sym=sym)

    def turn(x: dict[str, Tensor]) -> None:
        scales = x[f"{Q_PROJ}.scales"]
        scales[1, 5:20] *= -1
        scales[0, 7] = 0

    change(tmp_path / "theirs", turn)
    W = dense.get_submodule(Q_PROJ).weight
    with torch.no_grad():
        W[5:20, 32:] *= -1
        W[7, :32] = 0
    check_same(tmp_path / "theirs", dense)


def test_matrices_may_differ_in_bits_and_groups(tmp_path):
    special = {"q_proj": (8, 64), "down_proj": (2, 48), "o_proj": (4, -1)}
    dense = write_gptq(tmp_path / "theirs", dynamic=special)
    model = check_same(tmp_path / "theirs", dense)
    found = {key.rpartition(".")[2]: x.spec.codebook for key, x in quantized_layers(model).items()}
    assert (found["q_proj"]["bits"], found["down_proj"]["group"]) == (8, 48)
    assert (found["o_proj"]["group"], found["up_proj"]["bits"]) == (None, 4)


def test_a_packed_head_and_biases_come_along(tmp_path):
    dense = write_gptq(tmp_path / "theirs", "qwen2", head=True)
    model = check_same(tmp_path / "theirs", dense, count=8)
    bias = model.get_submodule(Q_PROJ).bias.double()
    assert torch.equal(bias, dense.get_submodule(Q_PROJ).bias)


def test_a_tied_head_is_held_once(tmp_path):
    dense = write_gptq(tmp_path / "theirs", tie_word_embeddings=True)
    check_same(tmp_path / "theirs", dense)
    assert "lm_head.weight" not in load_file(tmp_path / "ours" / "model.safetensors")


def test_biases_of_zeros_where_the_model_has_none_are_left_out(tmp_path):
    dense = write_gptq(tmp_path / "theirs")
    change(tmp_path / "theirs", lambda x: x.update({f"{Q_PROJ}.bias": torch.zeros(64).half()}))
    check_same(tmp_path / "theirs", dense)


def test_older_folders_say_it_beside_their_config(tmp_path):
    dense = write_gptq(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    about = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    words = {k: x for k, x in about.items() if k not in ("quant_method", "checkpoint_format")}
    (tmp_path / "theirs" / "quantize_config.json").write_text(json.dumps(words))
    check_same(tmp_path / "theirs", dense)


def test_an_import_is_a_checkpoint_like_any_other(tmp_path):
    write_gptq(tmp_path / "theirs", scattered=True)
    made = import_gptq(tmp_path / "theirs", tmp_path / "ours")
    assert (made.matrices, made.bits) == (7, 4)
    found = inspect_checkpoint(tmp_path / "ours", verify_tensors=True)
    assert (found["quantized_matrices"], found["dtype"]) == (7, "float16")
    assert found["verification"]["damaged"] == 0
    export_dense(tmp_path / "ours", tmp_path / "dense", dtype="float32")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    for name, layer in quantized_layers(load(tmp_path / "ours")).items():
        assert torch.equal(dense[f"{name}.weight"], layer.dequantize())
