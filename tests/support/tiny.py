"""Small random models of many architectures, for tests of whatever takes a whole model."""

import hashlib
from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from quip.packed.digests import bytes_of

VOCAB, SEQLEN = 64, 12

OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
GQA = {**LLAMA, "num_key_value_heads": 2}
SLIDING = {**GQA, "sliding_window": 5}  # shorter than SEQLEN

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "opt": lambda: hf.OPTConfig(**OPT),
    "opt-post-norm": lambda: hf.OPTConfig(**OPT, do_layer_norm_before=False),
    "opt-350m": lambda: hf.OPTConfig(
        **{**OPT, "word_embed_proj_dim": 16}, do_layer_norm_before=False
    ),
    "llama": lambda: hf.LlamaConfig(**GQA),
    "mistral": lambda: hf.MistralConfig(**SLIDING),
    "qwen2": lambda: hf.Qwen2Config(**SLIDING, use_sliding_window=True, max_window_layers=2),
    "gemma2": lambda: hf.Gemma2Config(**SLIDING, head_dim=8),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**LLAMA),
    "phi": lambda: hf.PhiConfig(**LLAMA),
    # The blocks of these two return tuples.
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=4, n_head=4, vocab_size=VOCAB),
    "gptj": lambda: hf.GPTJConfig(
        n_embd=32, n_layer=4, n_head=4, rotary_dim=4, n_positions=32, vocab_size=VOCAB
    ),
}
EAGER_ONLY = ("gemma2", "bloom", "gptj")


def tiny(
    name: str,
    attention: str = "eager",
    *,
    dtype: torch.dtype = torch.float32,
    positions: int | None = None,
) -> nn.Module:
    """A random model whose every parameter matters: large weights, biases that are not zero."""
    config = CONFIGS[name]()
    if positions is not None:
        config.max_position_embeddings = positions
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=rng)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.to(dtype).eval()


def tokens(count: int = 7) -> Tensor:
    return torch.randint(VOCAB, (count, SEQLEN), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, windows: int = 2) -> Tensor:
    """The logits of the model on so many windows of tokens."""
    return model(input_ids=tokens(windows)).logits


def digest(model: nn.Module) -> str:
    """SHA-256 of all tensors of a model, and of their names."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()
