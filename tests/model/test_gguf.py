"""GGUF files give the model that was put in, whatever they say of it, or are refused by name."""

import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from quip.errors import QuipError
from quip.model.gguf.once import NAMES
from quip.model.load import LoadedModel, load_model
from tests.support.gguf_files import write_gguf
from tests.support.runs import write_text
from tests.support.tiny import GQA, SLIDING, logits

ROPE = {"rope_theta": 10000.0}


def made(config: hf.PretrainedConfig) -> nn.Module:
    """A random model of a config, its norms and biases not ones and zeros."""
    model = hf.AutoModelForCausalLM.from_config(config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=rng)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.eval()


def read(folder: Path, model: nn.Module, **said) -> LoadedModel:
    """The model again, by way of a file that says this of it."""
    write_gguf(folder / "model.gguf", model, **said)
    return load_model(str(folder / "model.gguf"))


def check_same(folder: Path, config: hf.PretrainedConfig, plain: nn.Module | None = None, **said):
    """A file gives the logits of the model that was put in, to a millionth.

    `plain` is a model of the same tensors that must be told apart from it by its logits.
    """
    model = made(config)
    expected = logits(model)
    found = logits(read(folder, model, **said).model)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    if plain is not None:
        plain.load_state_dict(model.state_dict())
        assert float((logits(plain) - expected).abs().max()) > 1e-2


def refusal(folder: Path, model: nn.Module, **said) -> str:
    with pytest.raises(QuipError) as caught:
        read(folder, model, **said)
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value}"


def llama(**changes) -> hf.LlamaConfig:
    return hf.LlamaConfig(**{**GQA, "head_dim": 8, **changes})


def llama3_divisors(theta: float, width: int, rope: dict) -> Tensor:
    """The tensor rope_freqs.weight, from the description of Llama 3.1's scaling."""
    found = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (i / width)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(found)


@pytest.mark.parametrize("key", [".rope.scaling.factor", ".rope.scale_linear"])
def test_linear_scaling_of_rotations_is_read(tmp_path, key):
    scaled = llama(rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0})
    check_same(tmp_path, scaled, made(llama()), keys={key: 4.0})


def test_a_factor_without_scaling_is_none(tmp_path):
    keys = {".rope.scaling.type": "none", ".rope.scaling.factor": 4.0}
    check_same(tmp_path, llama(), keys=keys)


def test_yarn_is_read(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    keys = {
        ".rope.scaling.type": "yarn",
        ".rope.scaling.factor": 4.0,
        ".rope.scaling.original_context_length": 8,
        ".rope.scaling.finetuned": True,
    }
    check_same(tmp_path, llama(rope_parameters={**ROPE, **yarn}), made(llama()), keys=keys)


@pytest.mark.parametrize("original", [8192, 64])
def test_the_frequencies_of_llama_3_1_are_read(tmp_path, original):
    words = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
    words["original_max_position_embeddings"] = original
    config = llama(head_dim=32, rope_parameters={**ROPE, "rope_type": "llama3", **words})
    divisors = llama3_divisors(10000.0, 32, words)
    assert len(divisors.unique()) > 2
    keys = {".attention.key_length": 32, ".rope.dimension_count": 32}
    plain = made(llama(head_dim=32))
    check_same(tmp_path, config, plain, keys=keys, tensors={"rope_freqs.weight": divisors})


def test_frequencies_that_are_not_llama_3_1s_are_refused(tmp_path):
    line = refusal(tmp_path, made(llama()), tensors={"rope_freqs.weight": torch.rand(4) + 1})
    assert "UnsupportedModel" in line
    assert "tensor rope_freqs.weight divides the frequencies" in line
    assert "give the model's original folder or hub id" in line


def test_longrope_of_phi_3_is_read(tmp_path):
    short, long = [1.0, 1.5, 2.0, 3.0], [2.0, 3.0, 5.0, 9.0]
    sizes = {**GQA, "pad_token_id": 0, "tie_word_embeddings": False}
    words = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    words |= {"original_max_position_embeddings": 16, "attention_factor": 1.25}
    scaled = hf.Phi3Config(
        **sizes, original_max_position_embeddings=16, rope_parameters={**ROPE, **words}
    )
    check_same(
        tmp_path,
        scaled,
        made(hf.Phi3Config(**sizes)),
        architecture="phi3",
        keys={
            ".rope.scaling.original_context_length": 16,
            ".rope.scaling.attn_factor": 1.25,
            ".rope.dimension_count": 8,
        },
        tensors={
            "rope_factors_short.weight": torch.tensor(short),
            "rope_factors_long.weight": torch.tensor(long),
        },
    )


def test_heads_that_are_rotated_in_part_are_read(tmp_path):
    sizes = {**GQA, "pad_token_id": 0, "tie_word_embeddings": False}
    rope = {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}
    partly = hf.Phi3Config(**sizes, rope_parameters=rope)
    whole = made(hf.Phi3Config(**sizes))
    check_same(tmp_path, partly, whole, architecture="phi3", keys={".rope.dimension_count": 4})
    line = refusal(
        tmp_path, made(llama()), keys={".attention.key_length": 8, ".rope.dimension_count": 4}
    )
    assert "rotates 4 numbers of a head of 8" in line


def test_a_window_of_attention_is_read(tmp_path):
    sizes = {**SLIDING, "pad_token_id": 0, "tie_word_embeddings": False}
    wide = made(hf.Phi3Config(**{**sizes, "sliding_window": None}))
    keys = {".attention.sliding_window": 5}
    check_same(tmp_path, hf.Phi3Config(**sizes), wide, architecture="phi3", keys=keys)


def test_a_llama_that_transformers_takes_for_another_is_refused(tmp_path):
    line = refusal(tmp_path, made(llama()), keys={"general.name": "mistral"})
    assert "transformers takes it for a mistral, whose tensors it cannot place" in line


def test_tokens_that_a_file_does_not_name_are_none(tmp_path):
    config = read(tmp_path, made(llama()), keys={"tokenizer.ggml.eos_token_id": 1}).model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 1, None)


def test_the_base_of_rotations_is_the_formats_where_the_file_is_silent(tmp_path):
    theta = {"rope_theta": 500.0, "rope_type": "default"}
    sizes = {**GQA, "use_bias": True}
    keys = {".rope.freq_base": 500.0, ".attention.layer_norm_epsilon": 1e-5}
    keys[".attention.layer_norm_rms_epsilon"] = None
    check_same(
        tmp_path,
        hf.Starcoder2Config(**sizes, rope_parameters=theta),
        made(hf.Starcoder2Config(**sizes)),
        architecture="starcoder2",
        keys=keys,
    )


@pytest.mark.parametrize("switches", [["attention_bias"], ["attention_bias", "mlp_bias"]])
def test_biases_of_a_llama_are_read(tmp_path, switches):
    check_same(tmp_path, llama(**dict.fromkeys(switches, True)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_is_tied_where_the_file_has_none(tmp_path, tied):
    check_same(tmp_path, llama(tie_word_embeddings=tied))


def test_the_size_of_a_head_is_read(tmp_path):
    config = hf.Qwen3Config(**GQA, head_dim=16)
    keys = {".attention.key_length": 16, ".attention.value_length": 16}
    check_same(tmp_path, config, architecture="qwen3", keys=keys)
    check_same(tmp_path, hf.Qwen3Config(**GQA, head_dim=8), architecture="qwen3")  # by the width


def test_soft_caps_and_the_scale_of_scores_are_read(tmp_path):
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}
    sizes = {**SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}
    keys = {f".{key}": value for key, value in caps.items()} | {".attention.sliding_window": 5}
    keys |= {".attention.key_length": 8, ".attention.value_length": 8}
    uncapped = made(hf.Gemma2Config(**sizes))
    check_same(
        tmp_path, hf.Gemma2Config(**sizes, **caps), uncapped, architecture="gemma2", keys=keys
    )


@pytest.mark.parametrize("pattern", [{}, {".attention.sliding_window_pattern": 6}])
def test_layers_of_two_kinds_have_rotations_of_their_own(tmp_path, pattern):
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    config = hf.Gemma3TextConfig(
        **{**SLIDING, "num_hidden_layers": 6},
        head_dim=8,
        query_pre_attn_scalar=8,
        rope_parameters={"full_attention": full, "sliding_attention": sliding},
    )
    keys = {".attention.key_length": 8, ".attention.value_length": 8}
    keys |= {".attention.sliding_window": 5, ".rope.freq_base": 1e6, ".rope.scaling.factor": 8.0}
    check_same(tmp_path, config, architecture="gemma3", keys=keys | pattern)
    line = refusal(
        tmp_path,
        made(config),
        architecture="gemma3",
        keys=keys | {".attention.sliding_window_pattern": 3},
    )
    assert "gemma3.attention.sliding_window_pattern (3)" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logit_scale", 0.5),
        ("residual_scale", 2.0),
        ("attention.scale", 0.25),
        ("attention.clamp_kqv", 8.0),
        ("attention.sliding_window", 4),
        ("attention.causal", False),
        ("attention.value_length", 4),
        ("expert_count", 4),
        ("rope.scaling.alpha", 2.0),
        ("rope.scaling.type", "zork"),
        ("feed_forward_length", [48, 24, 48, 48]),
        ("something.of.tomorrow", "x" * 33_000),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_its_key(tmp_path, key, value):
    line = refusal(tmp_path, made(llama()), keys={f".{key}": value})
    assert "UnsupportedModel" in line
    assert key in line
    assert len(line) < 900


@pytest.mark.parametrize("key", ["expert_count", "logit_scale", "expert_used_count"])
def test_what_a_file_says_is_not_there_is_no_obstacle(tmp_path, key):
    check_same(tmp_path, llama(), keys={f".{key}": 0 if "count" in key else 0.0})


def test_a_tensor_that_no_parameter_receives_is_refused_by_its_name(tmp_path):
    line = refusal(tmp_path, made(llama()), tensors={"blk.0.attn_q_norm.weight": torch.ones(8)})
    assert "no parameter of a llama receives 1 of its tensors, such as" in line
    assert "blk.0.attn_q_norm.weight" in line


def test_frequencies_that_models_compute_are_no_obstacle(tmp_path):
    check_same(tmp_path, llama(), tensors={"blk.0.attn_rot_embd.weight": torch.ones(4)})


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_of_a_model_says_so(tmp_path, number):
    path = tmp_path / "model.gguf"
    keys = {"split.no": number, "split.count": 2, "split.tensors.count": 99}
    line = refusal(tmp_path, made(llama()), keys=keys)
    assert f"is part {number + 1} of 2 of a model; join the parts with llama-gguf-split" in line
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.xrchitecture"))
    with pytest.raises(QuipError, match=f"is part {number + 1} of 2 of a model"):
        load_model(str(path))


def test_files_of_something_else_are_refused(tmp_path):
    line = refusal(tmp_path, made(llama()), keys={"general.type": "adapter"})
    assert "holds something else than a model, 'adapter'" in line


def test_values_that_are_not_what_their_keys_promise_are_damage(tmp_path):
    path = tmp_path / "model.gguf"
    for key, value in (("embedding_length", "wide"), ("attention.key_length", "x")):
        line = refusal(tmp_path, made(llama()), keys={f".{key}": value})
        assert "Unavailable" in line
        assert "download it again" in line
    write_gguf(path, made(llama()))
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.xrchitecture"))
    with pytest.raises(QuipError, match="names no architecture; download it again"):
        load_model(str(path))


def pieces(folder: Path, text: str, **keys) -> list[str]:
    """The tokens of a text by the tokenizer of a file that says this of it."""
    entries = [*"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "▁", ".", "<0x0A>", "ab", "12", "123"]
    entries += ["Ġ1", "abc", "▁ab", "<s>", "</s>"]
    entries += [f"x{number}" for number in range(64 - len(entries))]
    said = {
        "tokens": entries,
        "merges": ["a b", "Ġ 1", "1 2", "12 3"],
        "token_type": [3 if entry in ("<s>", "</s>") else 1 for entry in entries],
        "bos_token_id": entries.index("<s>"),
        **keys,
    }
    said = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    loaded = read(folder, made(llama()), keys=said)
    loaded.tokenizer.save_pretrained(folder / "again")
    again = hf.AutoTokenizer.from_pretrained(folder / "again")
    assert again(text).input_ids == loaded.tokenizer(text).input_ids  # it is saved as it is
    return loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer(text).input_ids)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt-2", ["ab", "Ġ1", "2", "3"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3"]),
        ("default", ["ab", "Ġ", "123"]),
        ("falcon", ["ab", "Ġ", "123"]),
        ("stablelm2", ["ab", "Ġ", "1", "2", "3"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3"]),
        ("llama-bpe", ["<s>", "ab", "Ġ", "123"]),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path, name, found):
    assert pieces(tmp_path, "ab 123", pre=name) == found


def test_words_of_llama_3_are_taken_whole_and_a_first_token_added(tmp_path):
    assert pieces(tmp_path, "abc", pre="llama-bpe") == ["<s>", "abc"]
    assert pieces(tmp_path, "abc", pre="gpt-2") == ["ab", "c"]
    assert pieces(tmp_path, "abc", pre="llama-bpe", add_bos_token=False) == ["abc"]


def test_an_unknown_way_to_split_text_is_refused(tmp_path):
    line = refusal(tmp_path, made(llama()), keys={"tokenizer.ggml.pre": "zork"})
    assert "its text is split in a way called 'zork' (tokenizer.ggml.pre)" in line


def test_a_space_goes_in_front_of_the_first_word_where_the_file_says_so(tmp_path):
    said = {
        "model": "llama",
        "merges": ["a b", "▁ ab"],
        "scores": [0.0] * 64,
        "add_bos_token": False,
    }
    assert pieces(tmp_path, "ab", **said)[0].startswith("▁")
    assert pieces(tmp_path, "ab", **said, add_space_prefix=False) == ["ab"]


def test_a_file_is_parsed_once_and_the_package_is_left_as_it_was(tmp_path, monkeypatch):
    import gguf

    known = {name: getattr(gguf, name) for name in NAMES}
    asked: list[str] = []

    def counted(name: str):
        def ask(*args):
            asked.append(name)
            return known[name](*args)

        return ask

    for name in NAMES:
        monkeypatch.setattr(gguf, name, counted(name))
    now = {name: getattr(gguf, name) for name in NAMES}
    read(tmp_path, made(llama()))
    assert asked.count("GGUFReader") == 1
    assert asked.count("get_tensor_name_map") <= 2  # by quip and by transformers
    assert {name: getattr(gguf, name) for name in NAMES} == now
    with pytest.raises(QuipError):
        load_model(str(write_text(tmp_path / "text.gguf")))
    assert {name: getattr(gguf, name) for name in NAMES} == now
