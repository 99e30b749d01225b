"""Tiny models in .gguf files, as llama.cpp writes them."""

from pathlib import Path

import gguf
import torch

from tests.support.tiny import VOCAB
from tests.support.tokenizer import ENTRIES


def write_gguf(path: Path, model: torch.nn.Module, *, architecture: str = "llama") -> None:
    """A Llama as llama.cpp stores it: rows of q and k interleaved, and the tokenizer inside."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(ENTRIES)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["2 0"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, x in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            x = x.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), x.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
