"""Tiny mixtures of experts, one of each family."""

from collections.abc import Callable, Mapping

import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.packed.exchange import replace
from quip.packed.experts import unfuse
from quip.packed.linear import QuantizedLinear
from tests.support.tiny import VOCAB

ROUTERS = (".gate", ".router", ".shared_expert_gate")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CHOSEN = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **SIZES,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

MIXTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: hf.MixtralConfig(**LOCAL),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(
        **CHOSEN, moe_intermediate_size=24, shared_expert_intermediate_size=40
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**CHOSEN, moe_intermediate_size=24, head_dim=8),
    "olmoe": lambda: hf.OlmoeConfig(**CHOSEN),
    "deepseek-v2": lambda: hf.DeepseekV2Config(**DEEPSEEK),
    "deepseek-v3": lambda: hf.DeepseekV3Config(**DEEPSEEK),
    "gpt-oss": lambda: hf.GptOssConfig(**LOCAL, head_dim=8, sliding_window=5),
    "llama-4": lambda: hf.Llama4TextConfig(
        **{**LOCAL, "num_experts_per_tok": 1}, intermediate_size_mlp=40, head_dim=8
    ),
    "nemotron-h": lambda: hf.NemotronHConfig(  # without gates
        **SIZES,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=40,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        head_dim=8,
        layers_block_type=["moe", "attention"],
    ),
}


def mixture(
    name: str, *, dtype: torch.dtype = torch.float32, implementation: str = "eager"
) -> PreTrainedModel:
    """A random mixture, fused, whose every parameter matters, made as from_pretrained does it."""
    model = AutoModelForCausalLM.from_config(MIXTURES[name](), dtype=dtype)
    if name != "llama-4":
        model.set_experts_implementation(implementation)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=rng)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.eval().requires_grad_(False)


def packed(
    model: PreTrainedModel,
    flags: Mapping[str, object],
    chosen: Callable[[str], bool] = lambda name: not name.endswith(ROUTERS),
) -> PreTrainedModel:
    """The model, unfused, its chosen matrices rounded as though no input knew of another."""
    unfuse(model)
    recipe, rng = build_recipe(**flags), torch.Generator().manual_seed(0)
    for name, module in [*model.named_modules()]:
        if "layers." in name and isinstance(module, nn.Linear) and chosen(name):
            H = torch.eye(module.in_features, dtype=torch.float64)
            found = quantize_matrix(module.weight.float().contiguous(), H, recipe, rng=rng)
            replace(model, name, QuantizedLinear.from_matrix(found, module.bias))
    return model.requires_grad_(False)
