"""What transformers knows as a causal language model is quantized, saved and loaded, or refused."""

import re
from collections import Counter

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quip.errors import Unavailable, UnsupportedModel
from quip.model.matrices import check_quantizable
from quip.model.quantize import quantize_model
from quip.packed import shards
from quip.packed.checkpoint import load, to_dense
from quip.packed.linear import quantized_layers
from tests.support.architectures import NEAREST, journey, small_model
from tests.support.checkpoints import damage, save
from tests.support.tiny import logits, tokens

# Their sizes hang together in ways of their own, or AutoModelForCausalLM cannot make them at all.
NOT_MADE = {
    *("blt", "cohere_compass_text", "dbrx", "dots3_note", "gemma3n", "gemma4_assistant"),
    *("gemma4_unified_assistant", "musicgen", "musicgen_melody", "qwen4_exp", "xlstm", "zamba2"),
}
REASONS = {
    "fused experts": r"Experts\)",
    "convolutions, Conv1D, and other parameters of two axes": "is not the weight of an nn.Linear",
    "several decoders, or blocks of several classes": "single decoder|blocks of one class",
    "matrices that never run: cross attention": "never ran",
    "blocks that are no plain chain": "may share state|one vector a token|blocks return a",
    "blocks that read a weight": "without calling it",
    "transformers cannot load what it saves": "cannot be loaded once it is saved",
}


@pytest.mark.parametrize(
    "model_type",
    [
        "gemma3",  # its files go by other names than its modules
        "gpt_bigcode",  # a parent initializes the weights of its parts
        "falcon",  # FalconLinear
        "phi4_multimodal",  # three towers
    ],
)
def test_a_kind_is_quantized_saved_and_loaded(model_type, tmp_path):
    assert journey(small_model(model_type), tmp_path) == ""


@pytest.mark.slow
def test_every_kind_is_quantized_saved_and_loaded_or_refused(tmp_path):
    found, failed = Counter(), {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            model = small_model(model_type)
        except Exception:
            found["not made"] += 1
            if model_type not in NOT_MADE:
                failed[model_type] = "it can no longer be made"
            continue
        try:
            line = journey(model, tmp_path / model_type)
        except Exception as error:
            failed[model_type] = repr(error)
            continue
        reason = next((name for name, words in REASONS.items() if re.search(words, line)), line)
        found[reason if line else "passed"] += 1
    print(*(f"{count:4} {what}" for what, count in found.most_common()), sep="\n")
    assert failed == {}
    assert found["passed"] >= 80


@pytest.fixture(scope="module")
def gemma3():
    """A quantized model whose files transformers writes under other names than its modules'."""
    model = small_model("gemma3")
    quantize_model(model, tokens(2), NEAREST, device="cpu", seed=0)
    return model


def test_files_of_older_folders_may_go_by_the_names_of_their_kind(gemma3, tmp_path):
    folder = save(gemma3, tmp_path / "model")
    ours, theirs = "model.language_model.norm.weight", "language_model.model.norm.weight"
    damage(folder, lambda tensors: tensors.update({theirs: tensors.pop(ours)}))
    assert torch.equal(logits(load(folder)), logits(gemma3))


def test_the_dense_model_is_saved_under_the_names_of_its_kind(gemma3, tmp_path):
    small_model("gemma3").save_pretrained(tmp_path / "plain")
    plain = to_dense(load(save(gemma3, tmp_path / "packed")))
    plain.save_pretrained(tmp_path / "dense")
    names = [load_file(tmp_path / x / "model.safetensors").keys() for x in ("plain", "dense")]
    assert names[0] == names[1] != plain.state_dict().keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(plain))


def test_what_could_not_be_loaded_is_not_announced_and_not_lost(gemma3, tmp_path, monkeypatch):
    def without_norm(model):
        return {k: x for k, x in own(model).items() if k != "model.language_model.norm.weight"}

    own = shards.narrowed
    monkeypatch.setattr(shards, "narrowed", without_norm)
    folder = tmp_path / "model"
    with pytest.raises(Unavailable, match=r"norm\.weight: config.json asks for it.* it is in .*-2"):
        save(gemma3, folder)
    assert not folder.exists()
    kept = load_file(tmp_path / "model-2" / "model.safetensors")
    assert all(f"{name}.codes" in kept for name in quantized_layers(gemma3))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["model-2", "tokenizer"]


def test_a_model_that_nobody_could_load_is_refused_before_it_is_quantized():
    model = small_model("mllama")
    with pytest.raises(UnsupportedModel, match="transformers makes no model of a MllamaTextConfig"):
        check_quantizable(model, "it")


def test_a_block_that_reads_a_weight_itself_is_refused(tmp_path):
    line = journey(small_model("deepseek_v32"), tmp_path)
    assert line.startswith("model.layers.0 reads the weight of a matrix without calling it")


def test_a_scale_of_two_axes_is_no_matrix(tmp_path):
    config = hf.CohereConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=32,
        use_qk_norm=True,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (4, 8)
    assert journey(model, tmp_path) == ""
