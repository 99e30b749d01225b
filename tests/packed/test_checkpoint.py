"""Checkpoints come back bitwise, take the room that is reported, and are refused when damaged."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import quip
from quip.errors import NonFinite, QuipError, Unavailable
from quip.matrix.build import build_recipe
from quip.model.load import load_model
from quip.model.quantize import quantize_model
from quip.packed import shards
from quip.packed.checkpoint import load, save_checkpoint, to_dense
from quip.packed.digests import DIGESTS
from quip.packed.linear import QuantizedLinear, quantized_layers
from tests.laws import GRIDS
from tests.support.checkpoints import (
    INCOHERENT,
    forked,
    quantized,
    refusal,
    refusals,
    save,
    tokenizer,
)
from tests.support.tiny import logits, tiny, tokens

QUANTS = ["ldlq", "ldlqRG", "nearest", "allbal", "ldlbal_admm", "gptq"]
WIDTHS = [2, 3, 4, 8]
Q = "model.layers.0.self_attn.q_proj"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["opt", "opt-350m", "llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_comes_back_bitwise(name, dtype, tmp_path):
    model = quantized(name, blocks=2, dtype=dtype)
    folder = save(model, tmp_path / "model")
    loaded = load(folder)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert quantized_layers(loaded).keys() == quantized_layers(model).keys()
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("grid", GRIDS)
def test_every_method_comes_back_bitwise(grid, tmp_path):
    start = list(GRIDS).index(grid)
    for i, wbits in enumerate(WIDTHS):  # over the grids, each method at each width
        quant = QUANTS[(start + i) % len(QUANTS)]
        flags = {**GRIDS[grid], "quant": quant, "wbits": wbits}
        model = quantized("llama", flags, blocks=1)
        loaded = load(save(model, tmp_path / quant))
        assert torch.equal(logits(loaded), logits(model)), flags
        for name, layer in quantized_layers(loaded).items():
            ours = quantized_layers(model)[name]
            assert torch.equal(layer.dequantize(), ours.dequantize())


def test_the_folder_holds_what_others_read_and_no_pickles(saved):
    assert names(saved) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    words = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert {key: words[key] for key in ("quant_method", "format")} == {
        "quant_method": "quip",
        "format": 1,
    }
    assert len(words["modules"]) == 14
    loaded = load_model(str(saved))
    assert loaded.tokenizer("ba").input_ids == [3, 2]
    assert isinstance(loaded.model.get_submodule(Q), QuantizedLinear)


def test_more_files_go_into_the_folder(model, tmp_path):
    folder = save(model, tmp_path / "model", texts={"run.json": "{}", "README.md": "# Tiny\n"})
    assert (folder / "run.json").read_text() == "{}"
    assert (folder / "README.md").read_text() == "# Tiny\n"


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = quantized("llama", blocks=1)
    before, expected = {k: x.clone() for k, x in model.state_dict().items()}, logits(model)
    save(model, tmp_path / "model")
    after = model.state_dict()
    assert all(torch.equal(x, after[k]) and x.dtype == after[k].dtype for k, x in before.items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("wbits", [2, 4])
def test_the_file_takes_the_bits_that_are_reported(wbits, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=2048,
    )
    model = LlamaForCausalLM(config).bfloat16().float().eval()  # as from a file in bfloat16
    flags = {"quant": "nearest", "wbits": wbits, "incoh_processing": True}
    records = quantize_model(model, tokens(2), build_recipe(**flags), device="cpu", seed=0)
    packed = sum(r.bits_per_weight * r.rows * r.columns / 8 for r in records)
    rest = sum(2 * parameter.numel() for parameter in model.parameters())
    path = save(model, tmp_path / "model") / "model.safetensors"
    assert sum(x.nbytes for x in load_file(path).values()) == pytest.approx(packed + rest)
    assert packed + rest < path.stat().st_size < 1.01 * (packed + rest)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (torch.float32, [1 / 3, 1.0], torch.float32),
        (torch.float32, [2.0**-24, -0.0], torch.float16),  # float16 holds its subnormals exactly
        (torch.float32, [1.0, 65504.0], torch.float16),
        (torch.float32, [1.0, 65536.0], torch.bfloat16),
        (torch.float32, [1 + 2**-10, 2.0**100], torch.float32),  # one for each, none for both
        (torch.bfloat16, [1.0, 2.0], torch.bfloat16),
        (torch.float64, [1 + 2**-30, 1.0], torch.float64),
    ],
)
def test_the_rest_is_stored_in_the_narrowest_type_that_holds_it(dtype, values, expected, tmp_path):
    model = quantized("llama", blocks=1, dtype=dtype)
    weight = model.model.embed_tokens.weight.data
    weight.copy_(torch.tensor(values, dtype=dtype).repeat(64, 16))
    folder = save(model, tmp_path / "model")
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert stored.dtype == expected
    loaded = load(folder).model.embed_tokens.weight
    assert loaded.dtype == dtype
    assert torch.equal(loaded, weight)
    assert torch.equal(loaded.signbit(), weight.signbit())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_nobody_could_load_is_not_saved(value, tmp_path):
    model = quantized("llama", blocks=1)
    model.lm_head.weight.data[3, 5] = value
    with pytest.raises(NonFinite, match=r"^lm_head\.weight: it holds NaN .*; nothing is saved"):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_embeddings_that_came_as_float16_are_stored_so_in_a_float32_run(tmp_path):
    tiny("llama", dtype=torch.float16).save_pretrained(tmp_path / "half")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    quantize_model(model, tokens(2), build_recipe(**INCOHERENT), device="cpu", seed=0)
    folder = save(model, tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    assert {str(x.dtype) for x in stored.values()} == {
        "torch.float16",
        "torch.bfloat16",  # steps, factors
        "torch.int32",
    }
    loaded = load(folder)
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["gemma2", "opt"])
def test_a_tied_head_is_stored_once(name, tmp_path):
    folder = save(quantized(name, blocks=1), tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    tied = [key for key, x in stored.items() if x.shape == (64, 32)]
    assert [key.rpartition(".")[0].rpartition(".")[2] for key in tied] == ["embed_tokens"]
    loaded = load(folder)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_a_large_model_is_cut_into_files(model, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", "10KB")
    folder = save(model, tmp_path / "model")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    assert not (folder / "model.safetensors").exists()
    expected = load_file(copy / "model.safetensors")
    found = {name: x for file in files for name, x in load_file(file).items()}
    assert all(torch.equal(x, found.pop(name)) for name, x in expected.items())
    assert not found
    for loaded in (load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(logits(loaded), logits(model))
    files[1].write_bytes(files[1].read_bytes()[:-1])
    assert f"{files[1].name} is damaged or truncated" in refusals(folder)
    files[1].unlink()
    assert files[1].name in refusal(folder)


def test_the_dense_model_has_no_trace_of_quip(saved, tmp_path):
    model = load(saved)
    expected = logits(model)
    assert to_dense(model) is model
    assert not quantized_layers(model)
    assert type(model.get_submodule(Q)) is nn.Linear
    # In float32, other products and one rounding of W_hat more.
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "dense")
    assert "quip" not in (tmp_path / "dense" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(model))


def test_the_dense_model_takes_the_dtype_asked_for_and_else_its_own(saved):
    assert to_dense(load(saved)).get_submodule(Q).weight.dtype == torch.float32
    assert to_dense(load(saved), torch.float16).get_submodule(Q).weight.dtype == torch.float16
    half = to_dense(load(saved, dtype=torch.bfloat16))
    assert half.get_submodule(Q).weight.dtype == torch.bfloat16


def test_a_model_just_quantized_becomes_dense_as_well(tmp_path):
    model = quantized("opt", blocks=1)
    save(model, tmp_path / "model")
    to_dense(model).save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(model))


def test_a_model_without_packed_matrices_is_not_saved(tmp_path):
    with pytest.raises(QuipError, match="holds no quantized matrix: there is nothing to pack"):
        save(tiny("llama"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("where", ["transformers.modeling_utils.safe_save_file", "json.dumps"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    where, existing, overwrite, model, saved, tmp_path, monkeypatch
):
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    final = tmp_path / "model"
    words = tokenizer(tmp_path / "tokenizer")
    if existing:
        shutil.copytree(saved, final)
    before = {path.name: path.read_bytes() for path in final.iterdir()} if existing else None
    monkeypatch.setattr(where, full_disk)
    with pytest.raises(Unavailable) as caught:
        save_checkpoint(model, words, final, overwrite=overwrite)
    monkeypatch.undo()
    assert str(caught.value) == (
        f"{final} cannot be written (No space left on device); make room, or name another place"
    )
    assert names(tmp_path) == (["model", "tokenizer"] if existing else ["tokenizer"])
    assert not existing or before == {path.name: path.read_bytes() for path in final.iterdir()}


def said_when_full(saved: Path, final: Path, large: int) -> list[str]:
    """What saving says where the disk takes no more, of each file in turn."""
    model, lines = quip.load(saved), []
    tokenizer, many = (AutoTokenizer.from_pretrained(saved) for _ in range(2))
    many.add_tokens([f"word{i}" for i in range(3000)])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write beyond the limit fails, since Python ignores its signal.
    for limit, words, texts in (
        (200, tokenizer, {}),  # config.json
        (large // 2, tokenizer, {}),  # model.safetensors
        (2 * large, many, {}),  # tokenizer.json
        (2 * large, tokenizer, {"run.json": "x" * 3 * large}),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        for folder, overwrite in ((final / "new", False), (final / "old", True)):
            with pytest.raises(QuipError) as refused:
                quip.save_checkpoint(model, words, folder, texts=texts, overwrite=overwrite)
            lines.append(f"{type(refused.value).__name__}: {refused.value}")
    return lines


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_what_was_there(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "old")
    large = (saved / "model.safetensors").stat().st_size
    lines = forked(lambda: said_when_full(saved, tmp_path, large))  # its limits end with it
    assert len(lines) == 8
    for i, line in enumerate(lines):
        folder = tmp_path / ("old" if i % 2 else "new")
        assert line.startswith(f"Unavailable: {folder} cannot be written (")
        assert "File too large" in line
        assert "\n" not in line
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == names(saved)
    for path in saved.iterdir():
        assert (tmp_path / "old" / path.name).read_bytes() == path.read_bytes()


def test_a_name_that_was_filled_meanwhile_is_kept_and_said_so(model, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("mine")
    with pytest.raises(Unavailable, match=r"what was to go there is in .*model-2$"):
        save(model, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "mine"
    assert torch.equal(logits(quip.load(tmp_path / "model-2")), logits(model))
    assert names(tmp_path) == ["model", "model-2", "tokenizer"]


def test_an_existing_checkpoint_is_replaced_whole_when_asked(model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001-of-00009.safetensors").write_text("of an older one")
    save(model, folder, overwrite=True)
    assert "model-00001-of-00009.safetensors" not in names(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata().keys() == {"format", DIGESTS}
    assert torch.equal(logits(load(folder)), logits(model))
