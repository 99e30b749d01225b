"""`quip export --dense`: the same model as plain layers, for tools that know nothing of quip."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quip.errors import NonFinite, Unavailable, UsageError
from quip.jobs.export import export_dense
from quip.matrix.build import build_recipe
from quip.packed.checkpoint import load
from quip.packed.linear import QuantizedLinear
from tests.support.checkpoints import QUIP, VECTORS, save_quantized
from tests.support.runs import save_model
from tests.support.tiny import tokens

pytestmark = pytest.mark.usefixtures("command")

EMBEDDING = "model.decoder.embed_tokens.weight"


def never(*args: object, **options: object) -> None:
    raise AssertionError("this is work that should not have been started")


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *((name, QUIP) for name in ("opt", "llama")),
        *(
            (name, build_recipe(**VECTORS[dim]))
            for name, dim in (("opt", "1D"), ("llama", "2D"), ("qwen2", "4D"))
        ),
    ],
    ids=["opt", "llama", "opt, 1D", "llama, 2D", "qwen2, 4D"],
)
def test_the_exported_model_computes_the_same_with_plain_layers(quip, tmp_path, name, recipe):
    save_quantized(tmp_path / "packed", name, recipe)
    status, out, err = quip("export", tmp_path / "packed", tmp_path / "dense", "--dense")
    assert (status, err, len(out.splitlines())) == (0, [], 1)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    with torch.no_grad():
        found, wanted = model(tokens()).logits, load(tmp_path / "packed")(tokens()).logits
    # Both in float32, in another order: the packed one may rotate activations, not weights.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    original = AutoTokenizer.from_pretrained(tmp_path / "packed-original")
    assert tokenizer("hello")["input_ids"] == original("hello")["input_ids"]


def test_the_exported_folder_needs_no_quip(packed, tmp_path):
    export_dense(packed, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'quip' not in sys.modules\n"
        "print(float(model(torch.arange(8)[None]).logits.double().square().sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "dense"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    with torch.no_grad():
        wanted = float(load(packed)(torch.arange(8)[None]).logits.double().square().sum())
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_weights_have_the_dtype_asked_for(packed, tmp_path, asked, made):
    size = export_dense(packed, tmp_path / "dense", dtype=asked)
    path = tmp_path / "dense" / "model.safetensors"
    weights = load_file(path)
    assert {weight.dtype for weight in weights.values()} == {made}
    assert size == path.stat().st_size
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["dtype"] == str(made).removeprefix("torch.")
    assert "lm_head.weight" not in weights  # tied: one matrix, as before
    layer = load(packed).get_submodule("model.decoder.layers.1.fc1")
    torch.testing.assert_close(
        weights["model.decoder.layers.1.fc1.weight"], layer.dequantize().to(made), rtol=0, atol=0
    )


def test_auto_is_what_the_checkpoint_computes_in(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    export_dense(copy, tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_weights_beyond_float16_are_refused_and_nothing_is_written(copy, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    tensors[EMBEDDING] = torch.full_like(tensors[EMBEDDING], 1e5)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFinite, match=f"{EMBEDDING}: .* beyond .* give --dtype bfloat16"):
        export_dense(copy, tmp_path / "dense", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    export_dense(copy, tmp_path / "dense", dtype="bfloat16")


def test_a_folder_with_files_is_replaced_whole_where_that_was_asked_for(quip, packed, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    status, out, [line] = quip("export", packed, tmp_path / "out", "--dense")
    assert (status, out) == (2, "")
    assert line.endswith("it exists and is not empty; name another folder or add --overwrite")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    status, out, _ = quip("export", packed, tmp_path / "out", "--dense", "--overwrite")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert status == 0
    assert (
        out == f"{tmp_path / 'out'}: {size / 1e3:.2f} kB, a plain folder that loads without quip\n"
    )
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_the_checkpoint_itself_is_never_overwritten(quip, copy, monkeypatch):
    monkeypatch.chdir(copy)
    for out in (copy, copy.parent, ".", "../copy"):
        status, _, [line] = quip("export", copy, out, "--dense", "--overwrite")
        assert status == 2
        assert "the checkpoint is in it, and would be lost" in line
    assert (copy / "run.json").exists()


def test_a_wrong_request_is_one_line_and_status_2_before_anything_is_read(
    quip, packed, tmp_path, monkeypatch
):
    monkeypatch.setattr("quip.jobs.export.load_model", never)
    (tmp_path / "file").write_text("")
    for words, reason in [
        ([packed, tmp_path / "out"], "add --dense for a plain Hugging Face one"),
        ([packed, "--dense"], "the following arguments are required: OUT"),
        ([packed, tmp_path / "out", "--dense", "--dtype", "int8"], "invalid choice: 'int8'"),
        ([packed, tmp_path / "file", "--dense"], "it is a file; name a folder"),
    ]:
        status, out, [line] = quip("export", *words)
        assert (status, out) == (2, "")
        assert reason in line
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_is_none_is_a_wrong_request(packed, tmp_path):
    with pytest.raises(UsageError, match="unknown dtype 'int8'; choose from auto, float32"):
        export_dense(packed, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_a_folder_named_demo_is_a_folder(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(packed, "demo")
    export_dense("demo", "dense")
    assert json.loads(Path("dense/config.json").read_text())["hidden_size"] == 32


def test_what_is_no_checkpoint_is_one_line_and_leaves_nothing(quip, copy, tmp_path):
    model = save_model(tmp_path / "dense")
    for folder, reason in [
        (model, "the model is not quantized"),
        (tmp_path / "nowhere", "not a checkpoint"),
    ]:
        status, out, [line] = quip("export", folder, tmp_path / "out", "--dense")
        assert (status, out, reason in line) == (1, "", True)
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(Unavailable, match="no usable tokenizer"):
        export_dense(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_were_never_quantized_are_as_they_were(packed, tmp_path):
    export_dense(packed, tmp_path / "dense")
    found: nn.Module = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    wanted: nn.Module = load(packed)
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=0, atol=0)
