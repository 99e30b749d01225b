"""Every causal language model that transformers knows, as small as its config allows."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from quip.errors import UnsupportedModel
from quip.matrix.build import build_recipe
from quip.model.matrices import check_quantizable
from quip.model.quantize import quantize_model
from quip.packed.checkpoint import load, read_model
from quip.packed.experts import fuse, unfuse
from tests.support.checkpoints import save
from tests.support.tiny import VOCAB, logits, tokens

# What sizes are called in configs, and how small they become.
SIZES = {
    32: "hidden_size n_embd d_model dim emb_dim embed_dim embedding_size word_embed_proj_dim "
    "max_position_embeddings n_positions max_seq_len n_ctx attention_hidden_size lru_width width "
    "dim_model text_embed_dim",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner mlp_dim ffn_size "
    "ffn_hidden_size dim_ff moe_intermediate_size shared_intermediate_size "
    "shared_expert_intermediate_size moe_shared_expert_intermediate_size intermediate_size_mlp "
    "expert_ffn_hidden_size dense_intermediate_size",
    2: "num_key_value_heads num_experts_per_tok moe_topk num_experts_per_token top_k moe_k",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads num_experts "
    "decoder_attention_heads num_local_experts n_routed_experts moe_num_experts",
    8: "head_dim rotary_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels d_kv "
    "linear_key_head_dim linear_value_head_dim",
    16: "kv_lora_rank q_lora_rank",
    VOCAB: "vocab_size",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
BLOCKS = {
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_blocks"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
}
PER_BLOCK = ("layer_types", "mlp_layer_types", "layers_block_type", "intermediate_size")
LEFT_OUT = {"transformers_version", "model_type", "architectures", "dtype", "per_layer_config"}
AS_THEY_ARE = ("rope_parameters", "rope_scaling")
DROPPED = object()
OWN: dict[str, dict[str, Any]] = {  # what a kind needs besides
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "mamba2": {"num_heads": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": DROPPED},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0, 0.0], "num_kv_shared_layers": 0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "laguna": {"num_attention_heads_per_layer": None},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [4, 8]},
    "xlnet": {"d_head": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "axk1": {"n_group": 1, "topk_group": 1, "n_routed_experts": 4},
    "hrm_text": {"layer_types": None},
    "xmod": {"default_language": "en_XX"},
}


NEAREST = build_recipe(quant="nearest", wbits=4)


def small_model(model_type: str) -> nn.Module:
    """A random model of a type. Raises whatever transformers does where it cannot be made."""
    model = AutoModelForCausalLM.from_config(_config(model_type)).eval()
    model.config.architectures = [type(model).__name__]
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    assert logits(model).isfinite().all()
    return model


def journey(model: nn.Module, folder: Path) -> str:
    """Quantize, save and load a model: the line with which quip refuses it, or none.

    As a user would: from a folder of the model, and saved again by transformers in the end.
    """
    try:
        unfuse(model)  # as loading does
        check_quantizable(model, "it")
        fuse(model)
        expected = logits(model)
        model.save_pretrained(folder / "plain")
        model = read_model("it", folder / "plain", str, dtype=torch.float32)
        torch.testing.assert_close(logits(model), expected)
        quantize_model(model, tokens(2), NEAREST, device="cpu", seed=0)
    except UnsupportedModel as error:
        return str(error)
    expected = logits(model)
    loaded = load(save(model, folder / "packed"))
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(folder / "again")
    assert torch.equal(logits(load(folder / "again")), expected)
    return ""


def _config(model_type: str) -> PretrainedConfig:
    """The config of a type with small sizes, those of its parts included."""
    kind = CONFIG_MAPPING[model_type]
    words = {**_small(kind().to_dict()), "use_cache": False, **OWN.get(model_type, {})}
    return kind(**{name: value for name, value in words.items() if value is not DROPPED})


def _small(words: dict[str, Any], blocks: int = 2) -> dict[str, Any]:
    """The words of a config with small sizes; of its parts, only the text has two blocks."""
    found = {}
    for name, value in words.items():
        if name in LEFT_OUT:
            continue
        if isinstance(value, dict) and name not in AS_THEY_ARE:
            found[name] = _small(value, 2 if "text" in name or "decoder" in name else 1)
        elif name in PER_BLOCK and isinstance(value, list):
            attention = [kind for kind in value if "full" in str(kind) or kind == "attention"]
            found[name] = [value[0], (attention or value[1:])[0]][:blocks]
        elif isinstance(value, int) and not isinstance(value, bool):
            size = blocks if name in BLOCKS else SMALL.get(name, value)
            found[name] = min(value, 1 if name in TOKENS else size)
        else:
            found[name] = value
    if "kv_lora_rank" in found and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found
