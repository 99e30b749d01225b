"""What is not in the layout of EXL3, or no model of ours, is one line that names it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quip.codebooks import Trellises
from quip.errors import QuipError, Unavailable, UnsupportedModel, UsageError
from quip.packed.exl3.read import import_exl3
from tests.support.damage import change
from tests.support.exl3 import random_matrix, reword, write_exl3

pytestmark = pytest.mark.usefixtures("command")

O_PROJ = "model.layers.0.self_attn.o_proj"
TRELLIS = f"{O_PROJ}.trellis"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exl3") / "llama"
    write_exl3(folder, kinds={"o_proj": (2, "mcg")})
    return folder


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def refusal(folder: Path, kind: type[QuipError], **options: object) -> str:
    """The one line with which a folder is refused, and nothing is left behind."""
    out = folder.parent / "out"
    with pytest.raises(QuipError) as caught:
        import_exl3(folder, out, **options)
    assert type(caught.value) is kind
    line = str(caught.value)
    assert line.startswith(f"{folder}: ")
    assert "\n" not in line
    assert not out.exists()
    return line


def rename(name: str, new: str):
    return lambda x: x.update({new: x.pop(name)})


def put(name: str, tensor: torch.Tensor):
    return lambda x: x.update({name: tensor})


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int16)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        (None, "was quantized by nothing, and exl3 can be read"),
        ({"quant_method": "gptq"}, "was quantized by 'gptq', and exl3"),
        ({"quant_method": ["exl3"]}, "was quantized by ['exl3'], and exl3"),
        ({}, "was quantized by nothing"),
    ],
)
def test_other_formats_are_refused_by_name(copy, quantization, reason):
    reword(copy, quantization_config=quantization)
    assert reason in refusal(copy, UnsupportedModel)


@pytest.mark.parametrize("words", [{"quantization_config": "exl3"}, {"model_type": "none such"}])
def test_a_config_that_is_none_is_damage(copy, words):
    reword(copy, **words)
    assert "its config.json" in refusal(copy, Unavailable)


def test_a_config_of_more_layers_than_any_model_has_is_damage(copy):
    reword(copy, num_hidden_layers=10**9)
    assert "num_hidden_layers: 1000000000" in refusal(copy, Unavailable)


@pytest.mark.parametrize(
    ("kind", "edit", "reason"),
    [
        (Unavailable, lambda x: x.pop(f"{O_PROJ}.suh"), f"{O_PROJ}.suh: config.json asks for F16"),
        (
            Unavailable,
            put(f"{O_PROJ}.svh", torch.ones(64).half()),
            f"{O_PROJ}.svh: config.json asks for F16 [128], and the files have F16 [64]",
        ),
        (
            Unavailable,
            put(f"{O_PROJ}.svh", torch.ones(128)),
            "asks for F16 [128], and the files have F32 [128]",
        ),
        (
            Unavailable,
            put(f"{O_PROJ}.suh", torch.full((128,), torch.inf).half()),
            f"{O_PROJ}: a sign of its Hadamard transform is not finite: the file is damaged",
        ),
        (
            Unavailable,
            put(TRELLIS, words(8, 16, 32)),
            f"{TRELLIS}: config.json asks for I16 [8, 8, 32], and the files have I16 [8, 16, 32]",
        ),
        (
            Unavailable,
            put(TRELLIS, words(8, 8, 32).int()),
            "asks for I16 [8, 8, 32], and the files have I32 [8, 8, 32]",
        ),
        (Unavailable, put(TRELLIS, words(8, 8, 33)), f"{TRELLIS}: [8, 8, 33] words, of a matrix"),
        (Unavailable, put(TRELLIS, words(8, 8, 144)), "[8, 8, 144] words, of a matrix of 128 x"),
        (Unavailable, put(TRELLIS, words(8, 8, 0)), "[8, 8, 0] words, of a matrix of 128 x 128"),
        (Unavailable, put(TRELLIS, words(64, 32)), "[64, 32] words, of a matrix of 128 x 128"),
        (
            UnsupportedModel,
            put(TRELLIS, words(8, 8, 40)),
            f"{O_PROJ}: 2.5 bits a weight, of steps that alternate, are not read",
        ),
        (
            UnsupportedModel,
            put(f"{O_PROJ}.mcg", torch.tensor(12345, dtype=torch.int32)),
            f"{O_PROJ}.mcg names a code of multiplier 0x3039, and 0xcbac1fed can be read",
        ),
        (
            Unavailable,
            put(f"{O_PROJ}.mcg", torch.zeros(2, dtype=torch.int32)),
            f"{O_PROJ}.mcg: config.json asks for I32 [], and the files have I32 [2]",
        ),
        (
            Unavailable,
            put(f"{O_PROJ}.mul1", torch.tensor(1, dtype=torch.int32)),
            f"{O_PROJ} has the markers of two codes, mcg and mul1",
        ),
        (
            UnsupportedModel,
            put(f"{O_PROJ}.mad1", torch.tensor(1, dtype=torch.int32)),
            f"{O_PROJ}.mad1 is in the files, and in no model",
        ),
        (
            UnsupportedModel,
            put(f"{O_PROJ}.scale", torch.ones(())),
            f"{O_PROJ}.scale is in the files, and in no model",
        ),
        (
            UnsupportedModel,
            put(f"{O_PROJ}.bias", torch.ones(128).half()),
            f"{O_PROJ}.bias is in the files, and in no model",
        ),
        (
            Unavailable,
            lambda x: x.pop("model.norm.weight"),
            "model.norm.weight: config.json asks for F16 or BF16 or F32 [128], and the files have",
        ),
        (Unavailable, lambda x: x.pop(TRELLIS), "its files hold no packed matrix"),
        (
            UnsupportedModel,
            rename(TRELLIS, "model.layers.0.mlp.experts.0.up_proj.trellis"),
            "model.layers.0.mlp.experts.0.up_proj is a matrix of its files, and in a "
            "LlamaForCausalLM of transformers there is no such module",
        ),
        (
            UnsupportedModel,
            rename(TRELLIS, "model.embed_tokens.trellis"),
            "in a LlamaForCausalLM of transformers it is a Embedding",
        ),
        (UnsupportedModel, rename(TRELLIS, ".trellis"), "is a matrix of its files"),
        (UnsupportedModel, rename(TRELLIS, "two\nlines.trellis"), "'two\\nlines' is a matrix"),
        (UnsupportedModel, put("two\nlines", torch.ones(1)), "'two\\nlines' is in the files"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, kind, edit, reason):
    change(copy, edit)
    assert reason in refusal(copy, kind)


def test_sizes_that_files_fill_up_are_named(tmp_path):
    write_exl3(tmp_path / "copy", kinds={"o_proj": (2, "mcg")}, vocab_size=96)
    tensors, _ = random_matrix(128, 128, 2, "mcg", np.random.default_rng(0))
    change(
        tmp_path / "copy",
        lambda x: (
            x.pop("lm_head.weight"),
            x.update({f"lm_head.{key}": y for key, y in tensors.items()}),
        ),
    )
    line = refusal(tmp_path / "copy", UnsupportedModel)
    assert "lm_head: its 96 outputs are no multiple of 128" in line


def test_a_pickle_is_never_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refusal(copy, Unavailable)


def test_files_that_are_missing_or_damaged_are_named(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is damaged" in refusal(copy, Unavailable)
    path.unlink()
    assert "there is no model.safetensors" in refusal(copy, Unavailable)
    (copy / "config.json").write_text("[]")
    assert "config.json is damaged (" in refusal(copy, Unavailable)
    shutil.rmtree(copy)
    assert "no config.json that can be read" in refusal(copy, Unavailable)


def test_a_folder_without_tokenizer_needs_one_by_name(copy, published, tmp_path):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "give --tokenizer NAME" in refusal(copy, Unavailable)
    import_exl3(copy, tmp_path / "out", tokenizer=str(published))
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_model_itself_is_never_overwritten(copy):
    for out in (copy, copy.parent):
        with pytest.raises(UsageError, match="the model is in it, and would be lost"):
            import_exl3(copy, out, overwrite=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rows": 256}, "the order mma is one of 16 x 16 steps, not of 256 x 16"),
        ({"columns": 8, "group": None}, "not of 16 x 8"),
        ({"bits": 1.5}, "not of 16 x 8"),
    ],
)
def test_an_order_that_a_tile_cannot_have_is_damage(published, tmp_path, options, reason):
    import_exl3(published, tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["codebook"] |= options
    path.write_text(json.dumps(config))
    from quip.packed.checkpoint import load

    with pytest.raises(QuipError, match=reason):
        load(tmp_path / "ours")


def test_tiles_that_do_not_fit_a_matrix_are_damage():
    options = {"code": "mcg", "bits": 2, "states": 16, "rows": 16, "columns": 16, "group": None}
    with pytest.raises(QuipError, match="tiles of 16 x 16 do not fit 24 x 32 weights"):
        Trellises.restore({"scale": torch.ones(1)}, 24, 32, **options, order="mma", own=False)


def test_tensors_of_a_matrix_may_lie_in_several_files(copy, tmp_path):
    found = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    parts = {"a": {}, "b": {}}
    for i, (name, x) in enumerate(sorted(found.items())):
        parts["ab"[i % 2]][name] = x
    where = {name: f"{part}.safetensors" for part, x in parts.items() for name in x}
    for part, x in parts.items():
        save_file(x, copy / f"{part}.safetensors", metadata={"format": "pt"})
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert import_exl3(copy, tmp_path / "ours").matrices == 1
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    assert "names a file '../a.safetensors', which is no plain name" in refusal(copy, Unavailable)
