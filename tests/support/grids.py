"""Tiny models of packed integer grids at random: codes, steps and zeros of any kind."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel

from quip.codebooks.base import Groups
from quip.codebooks.grids import Grids
from quip.packed.checkpoint import save_checkpoint
from quip.packed.linear import QuantizedLinear
from quip.packed.matrix import QuantizedMatrix
from quip.transforms import Chain
from tests.support.tiny import GQA
from tests.support.tokenizer import ENTRIES

WIDE = {**GQA, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
CONFIGS = {
    "llama": hf.LlamaConfig,
    "mistral": lambda **words: hf.MistralConfig(**{"sliding_window": None, **words}),
    "qwen2": hf.Qwen2Config,
    "qwen3": lambda **words: hf.Qwen3Config(  # whose heads transformers takes to be of 128
        **{**words, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    ),
}


def random_grids(
    m: int,
    n: int,
    bits: int,
    group: int | None,
    rng: torch.Generator,
    *,
    middle: bool = False,
    symmetric: bool = False,
    signed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Grids]:
    """Codes [m, n] and their grids: zeros at random or all in the `middle`, 2^(bits - 1).

    `symmetric` are half-integer grids, with one row of steps; `signed` ones store no zeros.
    """
    groups = Groups(n, group)
    step = (0.02 * (0.5 + torch.rand(1 if symmetric else m, groups.count, generator=rng))).to(dtype)
    zero = torch.randint(2**bits, (m, groups.count), generator=rng, dtype=torch.uint8)
    if middle:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    codes = torch.randint(2**bits, (m, n), generator=rng, dtype=torch.uint8)
    stored = None if symmetric or signed else zero
    return codes, Grids(bits=bits, step=step, zero=stored, groups=groups, signed=signed)


def grid_model(
    name: str = "llama", bits: int = 4, group: int | None = 32, *, middle: bool = True, **words
) -> PreTrainedModel:
    """A tiny model whose every nn.Linear but the head is a packed grid, the rest random.

    `words` go to `random_grids`, and what that does not take to the config.
    """
    rng = torch.Generator().manual_seed(0)
    kinds = {key: words.pop(key) for key in ("symmetric", "signed", "dtype") if key in words}
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](**{**WIDE, **words})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=rng)
            parameter.copy_((noise if parameter.ndim > 1 else parameter + noise).half())
    for key, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and key != "lm_head":
            m, n = module.weight.shape
            codes, decoder = random_grids(m, n, bits, group, rng, middle=middle, **kinds)
            matrix = QuantizedMatrix(codes=codes, decoder=decoder, transform=Chain(()), damp=0.0)
            model.set_submodule(key, QuantizedLinear.from_matrix(matrix, module.bias))
    return model.requires_grad_(False)


def save_grids(folder: Path, name: str = "llama", *options, **words) -> Path:
    """The folder of a checkpoint of `grid_model`."""
    save_checkpoint(grid_model(name, *options, **words), byte_level(), folder)
    return folder


def byte_level() -> hf.PreTrainedTokenizerFast:
    """A tokenizer of the 64 tiny entries that merges two of them, with an end of text."""
    vocabulary = {entry: i for i, entry in enumerate(ENTRIES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("2", "0")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
