"""A model whose blocks stay in their files is the model that is loaded whole."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quip.errors import NonFinite, Unavailable, UsageError
from quip.jobs.fingerprint import identity_of
from quip.model import ferry, load_streamed
from quip.model.load import LoadedModel, load_model
from quip.model.matrices import find_blocks
from quip.model.walk import blocks_at_rest, walk
from tests.support.checkpoints import save_quantized
from tests.support.mixtures import MIXTURES
from tests.support.runs import save_model
from tests.support.tiny import tokens
from tests.support.tokenizer import save_tokenizer

INDEX = "model.safetensors.index.json"
KINDS = ("llama", "opt", "opt-350m", "qwen2", "gptj", "bloom")


def both(folder: str, **options: str) -> tuple[LoadedModel, LoadedModel]:
    """The model loaded whole, and streamed."""
    return load_model(folder, **options), load_model(folder, stream="on", **options)


def on_meta(loaded: LoadedModel) -> set[str]:
    return {name for name, x in loaded.model.state_dict().items() if x.is_meta}


def hidden(loaded: LoadedModel) -> list[torch.Tensor]:
    """The hidden states that enter each block."""
    blocks = walk(loaded.model, tokens(), device="cpu", batch_size=3, stream=loaded.stream)
    return [block.hidden.clone() for block in blocks]


def sharded(folder: Path, name: str = "llama") -> Path:
    """A tiny model in several files; that of its first block's q_proj is returned."""
    whole = load_model(save_model(folder.with_name("whole"), name))
    whole.model.save_pretrained(folder, max_shard_size="20KB")
    save_tokenizer(folder)
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    assert len(set(files.values())) > 3
    return folder / files["model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_streamed_model_has_the_state_the_digest_and_the_walk_of_the_whole_one(
    tmp_path, name, dtype
):
    whole, streamed = both(save_model(tmp_path / "model", name), dtype=dtype)
    prefix, _ = find_blocks(streamed.model)
    assert on_meta(streamed) == {x for x in whole.model.state_dict() if x.startswith(prefix + ".")}
    for (a, x), (b, y) in zip(
        whole.model.state_dict().items(), streamed.stream.state(streamed.model), strict=True
    ):
        assert (a, x.dtype) == (b, y.dtype)
        assert torch.equal(x, y)
    assert identity_of(whole) == identity_of(streamed)
    before = on_meta(streamed)
    for x, y in zip(hidden(whole), hidden(streamed), strict=True):
        assert torch.equal(x, y)
    assert on_meta(streamed) == before


def test_experts_that_files_hold_one_by_one_are_those_of_the_whole_model(tmp_path):
    AutoModelForCausalLM.from_config(MIXTURES["mixtral"]()).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert any("block_sparse_moe.experts.3" in name for name in names)
    whole, streamed = both(str(tmp_path))
    assert identity_of(whole) == identity_of(streamed)


def test_the_next_block_is_read_beforehand_for_a_device_where_memory_is_ample():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert ferry.reads_ahead(cuda, 10, 80)
    assert not ferry.reads_ahead(cuda, 10, 79)
    assert not ferry.reads_ahead(cpu, 10, sys.maxsize)


@pytest.mark.parametrize("ahead", [False, True])
def test_one_block_is_in_memory_or_two_where_the_next_is_read(tmp_path, monkeypatch, ahead):
    monkeypatch.setattr(ferry, "reads_ahead", lambda *_: ahead)
    loaded = load_model(save_model(tmp_path / "model", "llama"), stream="on")
    _, blocks = find_blocks(loaded.model)
    reads, read = [], loaded.stream.read
    monkeypatch.setattr(loaded.stream, "read", lambda index: (reads.append(index), read(index))[1])
    for block in blocks_at_rest(loaded.model, device="cpu", stream=loaded.stream):
        there = [not next(one.parameters()).is_meta for one in blocks]
        assert there == [index == block.index for index in range(len(blocks))]
        assert max(reads) <= block.index + ahead
    assert reads == [0, 1, 2, 3]
    assert all(next(one.parameters()).is_meta for one in blocks)


def test_a_walk_left_early_leaves_nothing_in_memory(tmp_path):
    loaded = load_model(save_model(tmp_path / "model", "llama"), stream="on")
    before = on_meta(loaded)
    found = walk(loaded.model, tokens(), device="cpu", stream=loaded.stream)
    next(found)
    assert on_meta(loaded) < before
    found.close()
    assert on_meta(loaded) == before


def test_a_packed_checkpoint_is_streamed_as_it_is(tmp_path):
    save_quantized(tmp_path / "packed", "llama")
    whole, streamed = both(str(tmp_path / "packed"))
    assert on_meta(streamed)
    for (a, x), (b, y) in zip(
        whole.model.state_dict().items(), streamed.stream.state(streamed.model), strict=True
    ):
        assert (a, x.dtype) == (b, y.dtype)
        assert torch.equal(x, y)
    for x, y in zip(hidden(whole), hidden(streamed), strict=True):
        assert torch.equal(x, y)


def test_what_from_pretrained_knows_beside_the_weights_is_known(tmp_path):
    folder = save_model(tmp_path / "model", "llama")
    hf.GenerationConfig(max_new_tokens=7).save_pretrained(folder)
    whole, streamed = both(folder)
    assert streamed.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    assert streamed.model.config.to_dict() == whole.model.config.to_dict()
    assert streamed.model.name_or_path == whole.model.name_or_path
    assert not streamed.model.training


def test_several_files_are_read_by_their_index(tmp_path):
    sharded(tmp_path / "model")
    whole, streamed = both(str(tmp_path / "model"))
    assert identity_of(whole) == identity_of(streamed)


def test_a_file_that_lacks_a_tensor_of_the_index_is_refused_by_name(tmp_path):
    path = sharded(tmp_path / "model")
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file({"other": torch.zeros(1), **tensors}, path, metadata={"format": "pt"})
    with pytest.raises(Unavailable, match=rf"{path.name} lacks .*layers\.0\.self_attn\.q_proj"):
        load_model(str(tmp_path / "model"), stream="on")


def test_gaps_in_blocks_are_found_before_a_block_is_read(tmp_path):
    folder = Path(save_model(tmp_path / "model", "llama"))
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    for wrong in ({name: tensors[name][:8].clone()}, {}):
        rest = {k: x for k, x in tensors.items() if k != name}
        save_file({**rest, **wrong}, path, metadata={"format": "pt"})
        with pytest.raises(Unavailable, match=r"does not fit its config.*up_proj") as whole:
            load_model(str(folder))
        with pytest.raises(Unavailable) as streamed:
            load_model(str(folder), stream="on")
        assert str(streamed.value) == str(whole.value)


@pytest.mark.parametrize("change", ["replaced", "cut"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, change):
    folder = save_model(tmp_path / "model", "llama")
    loaded = load_model(folder, stream="on")
    path = Path(folder, "model.safetensors")
    if change == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        tensors = {name: x.clone() for name, x in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Unavailable, match=r"model\.safetensors was changed while it is in use"):
        hidden(loaded)


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    folder = save_model(tmp_path / "model", "llama", **{name.replace(".", "__"): float("nan")})
    loaded = load_model(folder, stream="on")
    with pytest.raises(NonFinite, match=name):
        identity_of(loaded)


def test_auto_streams_what_exceeds_a_quarter_of_the_free_memory(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", "llama")
    size = sum(x.nbytes for x in load_file(Path(folder, "model.safetensors")).values())
    for free, streams in ((4 * size, False), (4 * size - 1, True)):
        monkeypatch.setattr(load_streamed, "free_host_bytes", lambda free=free: free)
        assert bool(load_model(folder, stream="auto").stream) == streams
        # In half the bits it takes half the memory.
        assert load_model(folder, dtype="bfloat16", stream="auto").stream is None


def test_what_cannot_be_streamed_is_refused_with_a_remedy(tmp_path):
    folder = save_model(tmp_path / "model", "llama")
    with pytest.raises(UsageError, match="--stream sometimes: choose from auto, on, off"):
        load_model(folder, stream="sometimes")
    Path(folder, "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"--stream on: .* no safetensors"):
        load_model(folder, stream="on")
