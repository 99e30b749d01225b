"""Random models of a Llama's shape, and blocks of them packed, for the sections of bench_gpu.py."""

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from quip.matrix.build import build_recipe
from quip.matrix.recipe import Recipe
from quip.model.block_module import BlockModule
from quip.model.moments import Moments
from quip.model.siblings import quantize_siblings

LAYERS = 32  # of Llama-2-7B, to which the time of one is carried forward
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
TINY = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
LDLQ = {"quant": "ldlq", "incoh_processing": True}
RECIPES = {
    "int 4": build_recipe(wbits=4, **LDLQ),
    "gptq 4 g128": build_recipe(quant="gptq", wbits=4, groupsize=128),
    "int 2": build_recipe(wbits=2, **LDLQ),
    "int 3": build_recipe(wbits=3, **LDLQ),
    "E8P12": build_recipe(codebook="E8P12", **LDLQ),
    "E8P12RVQ4B": build_recipe(codebook="E8P12RVQ4B", **LDLQ),
}
FED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def llama(layers: int, on: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A random model of Llama-2-7B's blocks, or of tiny ones on a CPU, made where it says."""
    shape = SEVEN if on.type == "cuda" else TINY
    config = LlamaConfig(
        **shape,
        num_hidden_layers=layers,
        vocab_size=32000 if on.type == "cuda" else 100,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with on:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def moments(n: int, on: torch.device) -> Tensor:
    """Second moments of correlated inputs, in float64."""
    rng = torch.Generator(on).manual_seed(n)
    x = torch.randn(2 * n, n, generator=rng, device=on)
    x += 0.5 * x.roll(1, dims=1)
    return (x.T @ x / len(x)).double()


def pack_block(block: BlockModule, H: dict[str, Tensor], recipe: Recipe) -> None:
    """Quantize the matrices of a block in place; H by the name of the first that an input feeds."""
    named = {name.rpartition(".")[2]: name for name in block.matrices()}
    for group in FED:
        names = [named[last] for last in group]
        recipes = dict.fromkeys(names, recipe)
        seen = Moments(H=H[group[0]], count=1)
        for _ in quantize_siblings(block, names, seen, recipes, seed=0):
            pass


def packed(model: PreTrainedModel, recipe: Recipe, on: torch.device) -> PreTrainedModel:
    """The model with its first block quantized, and copies of it as all others."""
    H = {
        group[0]: moments(matrix.in_features, on)
        for group in FED
        for name, matrix in model.model.layers[0].named_modules()
        if name.endswith(group[0]) and isinstance(matrix, nn.Linear)
    }
    first = BlockModule(0, "model.layers.0", model.model.layers[0], device=on)
    pack_block(first, H, recipe)
    for index in range(1, len(model.model.layers)):
        model.model.layers[index] = copy.deepcopy(first.module)
        model.model.layers[index].self_attn.layer_idx = index
    return model
