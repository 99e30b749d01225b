"""What a .gguf file says of a model beside its tensors, in the words of llama.cpp."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quip.errors import UnsupportedModel, shown

FREE = "rope_freqs.weight"  # divisors of the frequencies of rotary embeddings


def words_of(model: PreTrainedModel) -> dict[str, Any]:
    """The keys of the model itself, without its architecture in front.

    Raises UnsupportedModel for rotary embeddings that GGUF has no word for.
    """
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        **_rope_words(config.rope_parameters),
    }


def divisors_of(model: PreTrainedModel) -> torch.Tensor | None:
    """The divisors of the rotary frequencies that Llama 3.1 has; None where there are none."""
    config = model.config
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    base, pairs = config.rope_parameters["rope_theta"], len(scaled)
    return base ** -(torch.arange(pairs, dtype=torch.float64) / pairs) / scaled.double()


def _rope_words(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    words: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("default", "llama3"):
        return words
    words |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope.get("factor") or 0)}
    if kind == "linear":
        return words
    original = rope.get("original_max_position_embeddings")
    if kind == "yarn" and isinstance(original, int):
        return words | {"rope.scaling.original_context_length": original}
    raise UnsupportedModel(
        f"its rotary embeddings are of the type {shown(kind)}, which GGUF has no word for; export "
        "it with --dense"
    )
