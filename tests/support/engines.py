"""Checkpoints that engines take whose attention knows heads of 32 numbers and more."""

from pathlib import Path

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedModel

from quip.jobs.plan import build_plan
from quip.matrix.build import build_recipe
from quip.matrix.recipe import Recipe
from quip.model.plan import Plan
from quip.model.quantize import quantize_model
from quip.packed.checkpoint import save_checkpoint
from tests.support.checkpoints import INCOHERENT, SHARP, VECTORS
from tests.support.speaking import numbers
from tests.support.tiny import VOCAB, tokens

OPT = {
    "hidden_size": 128,
    "word_embed_proj_dim": 128,
    "ffn_dim": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
NO_END = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
CONFIGS = {
    "opt": lambda: hf.OPTConfig(**OPT),
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA),
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=64),
    "phi3": lambda: hf.Phi3Config(**LLAMA, **NO_END),  # q, k and v are one matrix there
}
BLOCKED = {**SHARP, "hadamard_block": 32}
CHECKPOINTS: dict[str, tuple[str, dict[str, object]]] = {
    "opt": ("opt", INCOHERENT),
    "llama of stacks": ("llama", SHARP),
    "qwen2 of stacks": ("qwen2", SHARP),
    "mistral": ("mistral", INCOHERENT),
    "phi3": ("phi3", SHARP),
    "llama of groups": ("llama", {"wbits": 4, "groupsize": 32, "quant": "gptq"}),
    "llama of trellis codes": ("llama", {"codebook": "trellis", "wbits": 2}),
    "llama of learned codebooks": ("llama", VECTORS["2D"]),
    "llama of blocks": ("llama", BLOCKED),
}


def wide(name: str, recipe: Recipe | Plan) -> PreTrainedModel:
    """A random model of two blocks and its quantized matrices, in float32."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=rng)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    quantize_model(model, tokens(), recipe, device="cpu", seed=0)
    return model.requires_grad_(False)


def save_wide(folder: Path, kind: str) -> Path:
    """One of CHECKPOINTS, or `mixed`: a Llama of stacks, but for a single grid among them."""
    if kind == "mixed":
        fine = {"*.0.self_attn.v_proj": {"wbits": 4, "groupsize": 32}}
        model = wide("llama", build_plan(fine, default=build_recipe(**SHARP)))
    else:
        name, flags = CHECKPOINTS[kind]
        model = wide(name, build_recipe(**flags))
    save_checkpoint(model, numbers(), folder)
    return folder
