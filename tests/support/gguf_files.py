"""Tiny models in .gguf files, as llama.cpp writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from tests.support.tiny import VOCAB
from tests.support.tokenizer import ENTRIES

# Whose names of tensors are llama.cpp's for this architecture; others are written as a Llama's.
ARCHITECTURES = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items() if name != "opt"}


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    *,
    architecture: str = "llama",
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """A model as llama.cpp stores it, the tokenizer inside, with more keys and tensors.

    A Llama's rows of q and k are interleaved. A key is that of the model itself where it starts
    with a dot; None leaves one out.
    """
    config = model.config
    said = {
        ".block_count": config.num_hidden_layers,
        ".context_length": config.max_position_embeddings,
        ".embedding_length": config.hidden_size,
        ".feed_forward_length": config.intermediate_size,
        ".attention.head_count": config.num_attention_heads,
        ".attention.head_count_kv": config.num_key_value_heads,
        ".attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", 1e-5),
        ".vocab_size": VOCAB,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ENTRIES,
        "tokenizer.ggml.token_type": [1] * VOCAB,
        "tokenizer.ggml.merges": ["2 0"],
        **(keys or {}),
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in said.items():
        if value is not None:
            _add(writer, architecture + key if key.startswith(".") else key, value)
    kind = ARCHITECTURES.get(architecture, gguf.MODEL_ARCH.LLAMA)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, x in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind == gguf.MODEL_ARCH.LLAMA and ("q_proj" in name or "k_proj" in name):
            x = x.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        if "gemma" in architecture and name.endswith("norm.weight"):
            x = x + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), x.numpy())
    for name, x in (tensors or {}).items():
        writer.add_tensor(name, x.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)
