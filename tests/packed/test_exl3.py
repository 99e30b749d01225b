"""The layout of EXL3: words against its description, and folders that compute what it says."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from quip.jobs.export import export_dense
from quip.jobs.inspect import inspect_checkpoint
from quip.kernels.bits import unpack
from quip.kernels.trellis import ORDERS
from quip.model.load import load_model
from quip.model.tune.whole import ModelTuning, tune_model
from quip.packed.checkpoint import load
from quip.packed.exl3.codes import balanced, unpack_codes, unpack_signs
from quip.packed.exl3.read import import_exl3
from quip.packed.linear import quantized_layers
from tests.support.damage import change
from tests.support.exl3 import MIXED, packed, place, reword, text_of, words_of, write_exl3
from tests.support.tiny import tokens

pytestmark = pytest.mark.usefixtures("command")

FEW = {"o_proj": (2, "mcg"), "lm_head": (6, "mul1")}
NOISE = 1e-6  # of float32, in which W_hat is rounded once


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> tuple[PreTrainedModel, Path]:
    """A model of all bits and codes, and its folder."""
    folder = tmp_path_factory.mktemp("exl3") / "theirs"
    return write_exl3(folder), folder


@pytest.fixture(scope="module")
def ours(theirs) -> Path:
    """What is imported of that folder."""
    out = theirs[1].with_name("ours")
    import_exl3(theirs[1], out)
    return out


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load(folder, dtype="float32")(tokens()).logits


def assert_same_model(folder: Path, dense: PreTrainedModel) -> None:
    """Every packed matrix is the dense one, and so are the logits."""
    for name, layer in quantized_layers(load(folder)).items():
        W = dense.get_submodule(name).weight
        error = (layer.dequantize() - W).abs().max() / W.abs().max()
        assert float(error) < NOISE, name
    with torch.no_grad():
        wanted = dense(tokens()).logits
    # float32 on both sides, W_hat and activations rotated in another order.
    torch.testing.assert_close(
        logits(folder), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max())
    )


# Words


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_lie_where_the_description_puts_them(bits, rng):
    n, m = 32, 48
    tiles = torch.randint(2**bits, (n // 16, m // 16, 256), generator=rng)
    words = [[words_of(text_of(tile, bits)) for tile in row] for row in tiles.tolist()]
    found = unpack_codes(torch.tensor(words, dtype=torch.int16))
    assert found.shape == (m, n)
    for i in range(n // 16):
        for j in range(m // 16):
            for step in range(256):
                of_input, of_output = place(step)
                assert found[16 * j + of_output, 16 * i + of_input] == tiles[i, j, step]


def test_the_order_of_tensor_cores_holds_every_place_once():
    places = [16 * of_output + of_input for of_input, of_output in map(place, range(256))]
    assert ORDERS["mma"] == tuple(places)
    assert sorted(places) == list(range(256))


def test_signs_of_the_first_files_are_single_bits(rng):
    signs = 1.0 - 2 * torch.randint(2, (48,), generator=rng)
    assert torch.equal(unpack_signs(packed(signs.numpy())), signs.half())


@pytest.mark.parametrize("size", [0, 6e-8, 1e-3, 1, 6e4, torch.inf])
def test_vectors_of_any_size_stay_what_they_are(size):
    """Also where no power of two can bring all of them near 1, or none of them."""
    x = torch.full((8,), size).half()
    for few in ([], [0.0, -6e4], [6e-8, -6e4]):
        x[: len(few)] = torch.tensor(few)
        scale, signs = balanced(x)
        assert torch.equal(scale * signs.float(), x.float())
        assert few or size in (0, torch.inf) or 0.7 < float(signs[0]) < 1.5


# Folders


def test_an_imported_model_computes_what_the_description_says(theirs, ours):
    assert_same_model(ours, theirs[0])
    with torch.no_grad():
        assert not torch.equal(logits(ours), 0 * logits(ours))


def test_codes_and_scales_are_those_of_the_files(theirs, ours):
    found = load_file(ours / "model.safetensors")
    held = load_file(theirs[1] / "model.safetensors")
    for name, layer in quantized_layers(load(ours)).items():
        bits, code = MIXED[name.rpartition(".")[2]]
        assert (layer.spec.codebook["bits"], layer.spec.codebook["code"]) == (bits, code)
        scale, signs = found[f"{name}.scale"], found[f"{name}.signs_in"].float()
        assert torch.equal(scale * signs, held[f"{name}.suh"].float())
        assert 0.7 < float(signs.square().mean().sqrt()) < 1.5  # the size that signs have
        assert torch.equal(found[f"{name}.signs_out"], held[f"{name}.svh"])
        codes = unpack(found[f"{name}.codes"], bits, layer.in_features)
        assert torch.equal(codes, unpack_codes(held[f"{name}.trellis"]))


def test_what_is_said_of_an_import_is_what_it_holds(theirs, tmp_path):
    made = import_exl3(theirs[1], tmp_path / "ours")
    assert (made.matrices, made.codes) == (8, ("3inst", "mcg", "mul1"))
    sizes = {"gate_proj": 256, "up_proj": 256, "down_proj": 256}
    weights = {name: 128 * sizes.get(name, 128) for name in MIXED}
    bits = sum(MIXED[name][0] * count for name, count in weights.items())
    assert made.bits == pytest.approx(bits / sum(weights.values()))
    assert made.file_bytes == (tmp_path / "ours" / "model.safetensors").stat().st_size


def test_biases_stay_and_what_is_not_packed_stays_dense(tmp_path):
    kinds = {"q_proj": (3, "mul1"), "down_proj": (2, "mcg")}
    dense = write_exl3(tmp_path / "theirs", "qwen2", kinds)
    import_exl3(tmp_path / "theirs", tmp_path / "ours")
    assert_same_model(tmp_path / "ours", dense)
    model, name = load(tmp_path / "ours"), "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.get_submodule(name).bias.float(), dense.get_parameter(f"{name}.bias"))
    assert len(quantized_layers(model)) == 2


def test_the_first_files_hold_signs_without_scales(tmp_path):
    dense = write_exl3(tmp_path / "theirs", kinds={"k_proj": (4, "3inst")}, signs=True)
    import_exl3(tmp_path / "theirs", tmp_path / "ours")
    assert_same_model(tmp_path / "ours", dense)


@pytest.mark.parametrize("kinds", [FEW, {"o_proj": FEW["o_proj"]}], ids=["packed", "dense"])
def test_a_head_of_its_own_is_one_whatever_the_config_says(tmp_path, kinds):
    dense = write_exl3(tmp_path / "theirs", kinds=kinds)
    reword(tmp_path / "theirs", tie_word_embeddings=True)
    import_exl3(tmp_path / "theirs", tmp_path / "ours")
    assert_same_model(tmp_path / "ours", dense)


def test_a_tied_head_is_held_once(tmp_path):
    dense = write_exl3(
        tmp_path / "theirs", kinds={"o_proj": FEW["o_proj"]}, tie_word_embeddings=True
    )
    change(tmp_path / "theirs", lambda found: found.pop("lm_head.weight", None))
    import_exl3(tmp_path / "theirs", tmp_path / "ours")
    assert_same_model(tmp_path / "ours", dense)
    assert "lm_head.weight" not in load_file(tmp_path / "ours" / "model.safetensors")


def test_files_in_shards_are_read_like_one(theirs, ours, tmp_path):
    found = load_file(theirs[1] / "model.safetensors")
    for path in theirs[1].glob("*.json"):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        (tmp_path / "theirs" / path.name).write_bytes(path.read_bytes())
    save_torch_state_dict(found, tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    import_exl3(tmp_path / "theirs", tmp_path / "many")
    many, one = (load_file(x / "model.safetensors") for x in (tmp_path / "many", ours))
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)


# Checkpoints like all others


def test_inspecting_an_import_shows_its_bits(ours):
    found = inspect_checkpoint(ours, verify_tensors=True)
    assert found["quantized_matrices"] == len(MIXED)
    assert found["dtype"] == "float16"
    assert found["verification"]["damaged"] == 0
    bits = {(row["codebook"]["bits"], row["codebook"]["code"]) for row in found["specs"]}
    assert bits == set(MIXED.values())
    for row in found["specs"]:
        # Beside the codes 16 bits for each input and output, and a scale.
        assert 0 < row["bits_per_weight"] - row["codebook"]["bits"] < 0.26
    assert load_model(str(ours)).dtype_name == "float16"


@pytest.mark.parametrize("kinds", [FEW, {"lm_head": FEW["lm_head"]}], ids=["some", "none"])
def test_the_model_without_its_packed_head_is_read_alone(tmp_path, kinds):
    dense = write_exl3(tmp_path / "theirs", kinds=kinds)
    import_exl3(tmp_path / "theirs", tmp_path / "ours")
    model = AutoModel.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert len(quantized_layers(model)) == len(kinds) - 1
    with torch.no_grad():
        wanted = dense.model(tokens()).last_hidden_state
        torch.testing.assert_close(model(tokens()).last_hidden_state, wanted, rtol=0, atol=1e-4)


def test_an_import_is_exported_dense(theirs, ours, tmp_path):
    export_dense(ours, tmp_path / "dense", dtype="float32")
    found = load_file(tmp_path / "dense" / "model.safetensors")
    for name, layer in quantized_layers(load(ours)).items():
        assert torch.equal(found[f"{name}.weight"], layer.dequantize())


def test_an_import_is_tuned_and_its_codes_and_head_stay(tmp_path):
    dense = write_exl3(tmp_path / "theirs", kinds=FEW)
    import_exl3(tmp_path / "theirs", tmp_path / "ours")
    student = load(tmp_path / "ours", dtype="float32")
    layer = quantized_layers(student)["lm_head"]
    layer.signs_out += 0.3
    codes, signs = layer.codes.clone(), layer.signs_out.clone()
    tuning = ModelTuning(epochs=3, signs_lr=1e-2, lr=1e-4)
    record = tune_model(student, dense, tokens(8), tuning, device="cpu", seed=0)
    assert record.kl_after < 0.9 * record.kl_before
    assert not record.head
    assert torch.equal(layer.codes, codes)
    assert not torch.equal(layer.signs_out, signs)
