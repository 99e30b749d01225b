"""A checkpoint of grids as a .gguf file: read back by gguf, quip and transformers, or refused."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

from quip.errors import Unavailable, UnsupportedModel, UsageError
from quip.jobs.export import export_gguf
from quip.model.gguf.returned import check_returned
from quip.model.load import load_model
from quip.packed.checkpoint import load
from quip.packed.gguf.write import write_gguf
from quip.packed.linear import quantized_layers
from tests.support.grids import CONFIGS, WIDE, byte_level, grid_model, save_grids
from tests.support.tiny import VOCAB, logits

pytestmark = pytest.mark.usefixtures("command")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A Llama of 4 bits."""
    return save_grids(tmp_path_factory.mktemp("grids") / "llama")


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """What gguf itself reads of a file."""
    reader = gguf.GGUFReader(path)
    return {x.name: gguf.dequantize(x.data, x.tensor_type) for x in reader.tensors}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_file_gives_the_weights_and_logits_of_the_checkpoint(tmp_path, name, tied):
    kinds = {"symmetric": True} if name == "qwen2" else {"signed": True}
    bits = 3 if name == "mistral" else 4
    folder = save_grids(tmp_path / "saved", name, bits, 64, tie_word_embeddings=tied, **kinds)
    size, made = export_gguf(folder, tmp_path / "out.gguf")
    assert made == {"Q5_0" if name == "qwen2" else "Q4_0": 14}
    assert size == (tmp_path / "out.gguf").stat().st_size
    ours, read = load(folder, dtype="float32"), load_model(str(tmp_path / "out.gguf")).model
    for key, layer in quantized_layers(ours).items():
        assert torch.equal(layer.dequantize(), read.get_submodule(key).weight), key
    state = ours.state_dict()
    for key, x in read.state_dict().items():
        assert key not in state or torch.equal(x, state[key]), key
    torch.testing.assert_close(logits(read), logits(ours), rtol=0, atol=1e-5)  # sums of float32
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="out.gguf", dtype=torch.float32
    )
    assert torch.equal(logits(plain.eval()), logits(read))


def test_gguf_itself_reads_the_same_weights(saved, tmp_path):
    export_gguf(saved, tmp_path / "out.gguf")
    found, model = tensors_of(tmp_path / "out.gguf"), load(saved)
    names = {"v_proj": "attn_v", "o_proj": "attn_output", "down_proj": "ffn_down"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up"}
    for key, layer in quantized_layers(model).items():
        _, _, block, _, last = key.split(".")
        W = layer.dequantize().numpy()
        if last in names:
            assert np.array_equal(found.pop(f"blk.{block}.{names[last]}.weight"), W), key
            continue
        # Rows of a head: the first of both halves, the second of both, as llama.cpp rotates them.
        half = model.config.head_dim // 2
        head, rest = np.divmod(np.arange(len(W)), 2 * half)
        rows = 2 * half * head + rest % 2 * half + rest // 2
        assert np.array_equal(found.pop(f"blk.{block}.attn_{last[0]}.weight"), W[rows]), key
    assert np.array_equal(found.pop("output_norm.weight"), model.model.norm.weight.float())
    assert sorted(found) == sorted(
        ["token_embd.weight", "output.weight"]
        + [f"blk.{i}.{norm}_norm.weight" for i in (0, 1) for norm in ("attn", "ffn")]
    )


def test_a_file_says_what_llama_cpp_asks_for(saved, tmp_path):
    export_gguf(saved, tmp_path / "out.gguf")
    said = {k: x.contents() for k, x in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert said["general.architecture"] == "llama"
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert said["general.name"] == "llama"
    assert said["llama.attention.head_count_kv"] == 2
    assert said["llama.rope.dimension_count"] == 16
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert said["tokenizer.ggml.merges"] == ["2 0"]
    assert len(said["tokenizer.ggml.tokens"]) == said["llama.vocab_size"] == VOCAB
    assert said["tokenizer.ggml.token_type"][:3] == [1, 3, 1]  # </s> is a token of control
    assert said["tokenizer.ggml.eos_token_id"] == 1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotations_come_back(tmp_path, rope):
    model = grid_model(rope_parameters={"rope_theta": 500.0, **rope}, num_hidden_layers=1)
    write_gguf(model, byte_level(), tmp_path / "out.gguf", name="x")
    check_returned(tmp_path / "out.gguf", model.config, byte_level())
    read = load_model(str(tmp_path / "out.gguf")).model
    torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=1e-4)
    plain = grid_model(rope_parameters={"rope_theta": 500.0}, num_hidden_layers=1)
    assert float((logits(plain) - logits(model)).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("name", "words", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "says hidden_act: 'gelu', and a GGUF file"),
        ("mistral", {"sliding_window": 5}, "its config says sliding_window: 5"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embeddings are of the type 'dynamic'",
        ),
    ],
)
def test_what_a_file_cannot_say_of_a_model_is_refused(tmp_path, name, words, reason):
    folder = save_grids(tmp_path / "saved", name, num_hidden_layers=1, **words)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        export_gguf(folder, tmp_path / "out.gguf")
    assert "--dense" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["saved"]


def test_a_matrix_that_no_blocks_hold_is_refused_by_name(tmp_path):
    folder = save_grids(tmp_path / "saved", "llama", 4, 16, num_hidden_layers=1)
    reason = r"self_attn\.q_proj: each 16 of its inputs .*--groupsize 32"
    with pytest.raises(UsageError, match=reason):
        export_gguf(folder, tmp_path / "out.gguf")


def test_other_models_are_refused_by_name():
    model = hf.AutoModelForCausalLM.from_config(hf.GPTNeoXConfig(**{**WIDE, "hidden_size": 32}))
    with pytest.raises(UnsupportedModel, match="a GPTNeoXForCausalLM is not written as GGUF"):
        write_gguf(model, byte_level(), Path("x.gguf"), name="x")


@pytest.mark.parametrize("name", ["out", "folder.gguf", "there.gguf", "none/out.gguf"])
def test_a_file_that_cannot_be_is_refused_before_anything_is_read(tmp_path, name):
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "there.gguf").write_text("precious")
    with pytest.raises(UsageError, match="OUT "):
        export_gguf(tmp_path / "no such checkpoint", tmp_path / name)
    assert (tmp_path / "there.gguf").read_text() == "precious"


def test_a_file_is_replaced_when_asked(saved, tmp_path):
    (tmp_path / "there.gguf").write_text("dispensable")
    export_gguf(saved, tmp_path / "there.gguf", overwrite=True)
    assert len(tensors_of(tmp_path / "there.gguf")) == 21


def test_without_the_package_one_line_says_what_to_install(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("quip.jobs.export.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"GGUF files need the package gguf; install it with"):
        export_gguf(saved, tmp_path / "out.gguf")
