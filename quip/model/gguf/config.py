"""What a .gguf file says and transformers passes over: translated into the config, or refused.

transformers takes the keys and the tensors that it has names for, and leaves the others without a
word, which gives another model: default rotary embeddings where the file scales them, no biases.
So all that a file says of its model is accounted for here. It is in the config, or is put there,
or has no meaning for the result (and the reason stands beside it), or the file is refused.
"""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

from quip.errors import QuipError, Unavailable, UnsupportedModel, one_line, shown
from quip.model.gguf.header import Header, read_header
from quip.model.gguf.rope import translate_rope
from quip.model.gguf.tensors import check_tensors

REMEDY = "give the model's original folder or hub id"

# A file's key -> what configs call it; the first name that a config has a field for counts.
SAME = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions", "seq_length"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": (
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_epsilon",
        "norm_eps",
    ),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "use_parallel_residual": ("use_parallel_residual",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
}

# Keys that change no result.
SILENT = {
    "rope.scaling.finetuned": "how the model was trained, not what it computes",
    "tensor_data_layout": "the order of rows that every file of its architecture has",
}

# Biases that a file has -> the switches of configs that make room for them.
BIASES = {
    r"blk\.\d+\.attn_(q|k|v|qkv|output)\.bias": ("attention_bias", "use_bias", "bias"),
    r"blk\.\d+\.ffn_(gate|up|down)\.bias": ("mlp_bias", "use_bias", "bias"),
}


def read_gguf_config(name: str, path: Path) -> PretrainedConfig:
    """The config that a file's keys and tensors describe, with nothing of them left out.

    Raises Unavailable for a damaged file and UnsupportedModel for one of which a part would be
    lost; the message names the key or the tensor.
    """
    header = read_header(name, path)
    for key, value in header.own().items():
        varies = isinstance(value, list) and key in SAME and len(set(value)) > 1
        if varies and header.architecture not in GGUF_CONFIG_ARCHS:
            raise UnsupportedModel(
                f"{name}: its key {header.architecture}.{key} ({shown(value)}) differs between "
                f"layers, which no config can say; {REMEDY}"
            )
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        if "not supported" not in str(error) and "Unrecognized" not in str(error):
            raise Unavailable(
                f"{name} is not a GGUF file, or a truncated one ({one_line(error)}); "
                "download it again"
            ) from error
        raise UnsupportedModel(
            f"{name} holds a model of architecture {shown(header.architecture)}, which cannot be "
            f"read from GGUF: {one_line(error)}; {REMEDY}, or a Llama-like GGUF file"
        ) from error
    try:
        _complete(config, header, path)
        check_tensors(config, header)
    except QuipError as error:
        raise type(error)(f"{name}: {error}; {REMEDY}") from error
    except Exception as error:  # of a value that is not what its key promises
        raise Unavailable(
            f"{name} is a damaged GGUF file ({one_line(error)}); download it again"
        ) from error
    return config


def _complete(config: PretrainedConfig, header: Header, path: Path) -> None:
    """Put into the config what transformers left out of it. Raises UnsupportedModel by key."""
    own, known = header.own(), _seen(header)
    _fill_defaults(config, own)
    known |= translate_rope(config, own, header.tensors, path)
    for key, value in own.items():
        if key not in known and key not in SILENT and not _put(config, key, value):
            raise UnsupportedModel(
                f"its key {header.architecture}.{key} ({shown(value)}) has no place in the config "
                f"of a {config.model_type}"
            )
    for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" not in header.words:
            setattr(config, f"{token}_token_id", None)
    config.tie_word_embeddings = "output.weight" not in header.tensors
    for pattern, switches in BIASES.items():
        if any(re.fullmatch(pattern, tensor) for tensor in header.tensors):
            _set(config, switches, True)


def _seen(header: Header) -> set[str]:
    """The keys that transformers reads itself, for the architectures whose reader is a function."""
    seen: set[str] = set()

    class Watched(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            seen.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            seen.add(key)
            return super().get(key, default)

    if reader := GGUF_CONFIG_ARCHS.get(header.architecture):
        reader(Watched(header.words), header.tensors)
    return {key.removeprefix(f"{header.architecture}.") for key in seen}


def _put(config: PretrainedConfig, key: str, value: Any) -> bool:
    """Whether the config now says what the key says, or needs not."""
    if isinstance(value, list) and len(set(value)) == 1 and key in SAME:
        value = value[0]  # alike in every layer
    if key == "attention.causal":
        return value is True
    if key == "attention.value_length":
        return value == config.head_dim
    if key == "attention.head_count_kv" and config.model_type == "falcon":
        return value == 1  # the only layout that transformers makes of this architecture's files
    layers = getattr(config, "layer_types", ("sliding_attention",))
    if key == "attention.sliding_window_pattern":
        every = value if isinstance(value, list) else [(i + 1) % value for i in range(len(layers))]
        return [layer == "sliding_attention" for layer in layers] == list(map(bool, every))
    if key == "attention.sliding_window" and value and "sliding_attention" not in layers:
        return False  # no layer would look through it
    if isinstance(value, int | float) and not value:  # GGUF's word for "there is none"
        value = None
        return key not in ("attention.sliding_window", "final_logit_softcapping") or _set(
            config, SAME[key], None
        )
    return not isinstance(value, list) and _set(config, SAME.get(key, ()), value)


def _set(config: PretrainedConfig, names: tuple[str, ...], value: Any) -> bool:
    """Whether the config has a field of one of these names, which is then the value."""
    known = {field.name for field in fields(config)} | set(config.attribute_map) | {"head_dim"}
    name = next((name for name in names if name in known), None)
    if name is not None and getattr(config, name, None) != value:
        setattr(config, name, value)
    return name is not None


def _fill_defaults(config: PretrainedConfig, own: dict[str, Any]) -> None:
    """Where a file is silent its format's defaults hold, and not those of transformers' classes."""
    heads, width = own.get("attention.head_count"), own.get("embedding_length")
    if not (isinstance(heads, int) and isinstance(width, int) and heads > 0):
        return  # without attention, or another number of heads in every layer
    head = own.get("attention.key_length", width // heads)
    if head != getattr(config, "head_dim", width // heads):
        config.head_dim = head
    if "attention.head_count_kv" not in own:
        _set(config, SAME["attention.head_count_kv"], heads)
    if config.model_type in ("gemma2", "gemma3_text"):
        # llama.cpp tells the 27B models, whose scores have another scale, by their depth.
        largest = own.get("block_count") == {"gemma2": 46, "gemma3_text": 62}[config.model_type]
        config.query_pre_attn_scalar = width // heads if largest else head
