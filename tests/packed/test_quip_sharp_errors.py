"""What is not in the published layout, or cannot go into it, is one line that names it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from quip.errors import NonFinite, QuipError, Unavailable, UnsupportedModel, UsageError
from quip.jobs.export import export_quip_sharp
from quip.packed.checkpoint import save_checkpoint
from quip.packed.linear import quantized_layers
from quip.packed.quip_sharp.read import import_quip_sharp
from tests.support.checkpoints import save, save_quantized, tokenizer
from tests.support.published import change, reword, save_packed, write_published

pytestmark = pytest.mark.usefixtures("command")

O_PROJ = "model.layers.1.self_attn.o_proj"
E8P = {"codebook": "E8P12"}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "llama"
    write_published(folder)
    return folder


@pytest.fixture(scope="module")
def rescaled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rescaled") / "llama"
    write_published(folder, rescale=True)
    return folder


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def refusal(folder: Path, kind: type[QuipError], act=import_quip_sharp, **options: object) -> str:
    """The one line with which a folder is refused, and nothing is left behind."""
    out = folder.parent / "out"
    with pytest.raises(QuipError) as caught:
        act(folder, out, **options)
    assert type(caught.value) is kind
    line = str(caught.value)
    assert line.startswith(f"{folder}: ")
    assert "\n" not in line
    assert not out.exists()
    return line


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"codebook": "D4"}, "its codebook is 'D4', and E8P12, E8P12RVQ3B, E8P12RVQ4B"),
        ({"codebook_version": 0}, "E8P12 of version 0, and version 1 can be read"),
        ({"codebook": "E8P12RVQ3B"}, "E8P12RVQ3B of version 1, and version 0 can be read"),
        ({"lora_rank": 16}, "lora_rank 16, and only 0"),
        ({"outlier_channel_split": True}, "outlier_channel_split True, and only False"),
        ({"fused": False}, "fused False, and only True"),
        ({"idx_dtype": "torch.int16"}, "idx_dtype 'torch.int16', and only 'torch.int64'"),
        ({"model_version": 2}, "model_version 2, and only 1"),
    ],
)
def test_other_variants_of_the_layout_are_refused_by_name(copy, params, reason):
    reword(copy, params=params)
    assert reason in refusal(copy, UnsupportedModel)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"architectures": ["OPTForCausalLM"], "model_type": "opt"}, "OPTForCausalLM (opt)"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel (llama)"),
        ({"architectures": None}, "not named (llama)"),
        ({"quip_params": None}, "has no quip_params"),
    ],
)
def test_other_models_are_refused_by_name(copy, words, reason):
    reword(copy, **words)
    assert reason in refusal(copy, UnsupportedModel)


@pytest.mark.parametrize(
    ("kind", "edit", "reason"),
    [
        (Unavailable, lambda x: x.pop(f"{O_PROJ}.SU"), f"{O_PROJ}.SU: config.json asks for F16"),
        (
            Unavailable,
            lambda x: x.update({f"{O_PROJ}.SV": torch.ones(32).half()}),
            "and the files have F16 [32]",
        ),
        (
            Unavailable,
            lambda x: x.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
            "model.norm.weight: config.json asks for F16 or BF16 or F32 [64]",
        ),
        (
            UnsupportedModel,
            lambda x: x.update({f"{O_PROJ}.Qidxs": torch.ones(64, 8, dtype=torch.int16)}),
            "16-bit words, as the files of version 0",
        ),
        (
            UnsupportedModel,
            lambda x: x.update({f"{O_PROJ}.codebook_id": torch.tensor(17)}),
            "codebook_id 17, and that of E8P12 in config.json is 7",
        ),
        (
            UnsupportedModel,
            lambda x: x.update({f"{O_PROJ}.A": torch.ones(64, 4).half()}),
            "low-rank term (lora_rank)",
        ),
        (
            UnsupportedModel,
            lambda x: x.update({f"{O_PROJ}.bias": torch.ones(64).half()}),
            f"{O_PROJ}.bias is in the files, and in no model of this config.json",
        ),
        (
            UnsupportedModel,
            lambda x: x.update({f"{O_PROJ}.scaleWH": torch.ones(64)}),
            f"{O_PROJ}.scaleWH is in the files",
        ),
        (
            Unavailable,
            lambda x: x.update({f"{O_PROJ}.Wscale": torch.tensor(0.0).half()}),
            f"{O_PROJ}: a scale of its lattice is not a positive number",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, kind, edit, reason):
    change(copy, edit)
    assert reason in refusal(copy, kind)


def test_factors_of_the_inputs_have_to_be_whole_and_exact(rescaled, tmp_path):
    copy = Path(shutil.copytree(rescaled, tmp_path / "copy"))
    change(copy, lambda x: x.pop(f"{O_PROJ}.scaleWH"))
    assert f"{O_PROJ}.scaleWH: config.json asks for" in refusal(copy, Unavailable)
    change(copy, lambda x: x.update({f"{O_PROJ}.scaleWH": torch.full((64,), 1.001)}))
    assert f"{O_PROJ}.scaleWH has numbers that bfloat16" in refusal(copy, UnsupportedModel)


def test_sizes_that_the_layout_does_not_have_are_named(copy):
    reword(copy, intermediate_size=96)
    assert "mlp.down_proj: 96 inputs are no multiple of 64" in refusal(copy, UnsupportedModel)
    reword(copy, intermediate_size=11 * 64)
    line = refusal(copy, UnsupportedModel)
    assert "mlp.upgate_proj: the published layout of QuIP# has no Hadamard matrix of width" in line


def test_a_pickle_is_never_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refusal(copy, Unavailable)


def test_files_that_are_missing_or_damaged_are_named(copy):
    (copy / "model.safetensors").write_bytes(b"12345678{}")
    assert "model.safetensors is damaged" in refusal(copy, Unavailable)
    (copy / "model.safetensors").unlink()
    assert "there is no model.safetensors" in refusal(copy, Unavailable)
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "there is no model-1.safetensors" in refusal(copy, Unavailable)
    index.write_text("{}")
    assert f"{index.name} is damaged" in refusal(copy, Unavailable)
    (copy / "config.json").write_text("[]")
    assert "config.json is damaged (" in refusal(copy, Unavailable)
    shutil.rmtree(copy)
    assert "no config.json that can be read" in refusal(copy, Unavailable)


def test_a_folder_without_tokenizer_needs_one_by_name(copy, published, tmp_path):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "give --tokenizer NAME" in refusal(copy, Unavailable)
    import_quip_sharp(copy, tmp_path / "out", tokenizer=str(published))
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_model_itself_is_never_overwritten(copy):
    for out in (copy, copy.parent):
        with pytest.raises(UsageError, match="the model is in it, and would be lost"):
            import_quip_sharp(copy, out, overwrite=True)
    with pytest.raises(UsageError, match="add --overwrite"):
        import_quip_sharp(copy, copy.parent)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"codebook": "int", "wbits": 2, "range_": None}, "a grid, and the published layout has"),
        ({**E8P, "range_": "8"}, "a scale for every 8 columns, and .* with --range tensor"),
        ({**E8P, "no_fuse": True}, "up_proj, .*gate_proj are not quantized as one.* --no_fuse"),
        ({**E8P, "rotation": "kronecker"}, "by kronecker, .* --rotation hadamard"),
        ({**E8P, "hadamard_block": 32}, "blocks of 32, .* without --hadamard_block"),
    ],
)
def test_a_checkpoint_that_the_layout_cannot_express_is_refused(tmp_path, flags, reason):
    save_packed(tmp_path / "ours", flags=flags)
    line = refusal(tmp_path / "ours", UsageError, export_quip_sharp)
    assert re.search(reason, line)


def test_other_architectures_have_no_published_layout(tmp_path):
    save_quantized(tmp_path / "opt")
    line = refusal(tmp_path / "opt", UnsupportedModel, export_quip_sharp)
    assert "a OPTForCausalLM has no published layout" in line


def test_numbers_that_float16_would_change_are_refused(tmp_path):
    model = save_packed(tmp_path / "ours")
    layer = quantized_layers(model)[O_PROJ]
    kept = layer.scale.clone()
    for scale in (1.0001, 1e-9):
        layer.scale.fill_(scale)
        save(model, tmp_path / "scale", overwrite=True)
        line = refusal(tmp_path / "scale", UsageError, export_quip_sharp)
        assert f"{O_PROJ}: float16, in which the published layout has scales, does not hold" in line
    layer.scale.copy_(kept)
    model.get_parameter("model.norm.weight").data[0] = 1e5
    save_checkpoint(model, tokenizer(tmp_path / "tokenizer"), tmp_path / "norm")
    line = refusal(tmp_path / "norm", NonFinite, export_quip_sharp)
    assert "model.norm.weight holds values beyond the range of float16" in line


def test_a_width_that_others_have_no_matrix_for_is_refused(tmp_path):
    save_packed(tmp_path / "ours", intermediate_size=11 * 64)
    line = refusal(tmp_path / "ours", UsageError, export_quip_sharp)
    assert "no Hadamard matrix of width 1408" in line
