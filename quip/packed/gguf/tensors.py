"""The tensors of a model as a .gguf file has them: their names, types, and the order of rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor
from transformers import PreTrainedModel

from quip.errors import UnsupportedModel, UsageError
from quip.packed.gguf.blocks import blocks_of
from quip.packed.linear import QuantizedLinear, quantized_layers
from quip.packed.published import exactly

# By the class of the model: what GGUF calls it, and whether rows of q and k change places.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Planned:
    """A tensor of the file: its name, its type, and what makes its rows (in bytes, of blocks)."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of `make()`
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        width = TYPES[self.kind].itemsize if self.kind in TYPES else 1
        return width * math.prod(self.shape)


def architecture_of(model: PreTrainedModel) -> str:
    """What GGUF calls the model's kind. Raises UnsupportedModel for one that is not written."""
    kind = type(model).__name__
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(
            f"a {kind} is not written as GGUF, {', '.join(ARCHITECTURES)} are; export it with "
            "--dense, for the converter of llama.cpp"
        )
    return ARCHITECTURES[kind][0]


def plan_tensors(model: PreTrainedModel) -> list[Planned]:
    """Every tensor of the file: packed matrices as blocks, others in types that hold them exactly.

    Raises UnsupportedModel for an architecture that is not written, and UsageError, with its name,
    for a matrix that no kind of blocks holds.
    """
    import gguf  # of the extra of this name

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = kinds[architecture_of(model)]
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    layers = quantized_layers(model)
    packed = {f"{name}.{key}" for name, layer in layers.items() for key in layer.stored()}
    passed = packed | model.all_tied_weights_keys.keys()
    wanted: dict[str, QuantizedLinear | Tensor] = {}
    wanted |= {f"{name}.weight": layer for name, layer in layers.items()}
    wanted |= {key: x for key, x in model.state_dict().items() if key not in passed}
    found = []
    for key, x in wanted.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModel(f"GGUF has no name for {key}; export it with --dense")
        heads = _heads(model, key)
        if isinstance(x, QuantizedLinear):
            found.append(_packed(key, name, x, heads))
        else:
            found.append(_dense(name, x, heads))
    return found


def _packed(key: str, name: str, layer: QuantizedLinear, heads: int | None) -> Planned:
    def make() -> Tensor:
        return _permuted(blocks_of(layer).bytes(), heads)

    try:
        blocks = blocks_of(layer)
    except UsageError as error:
        raise UsageError(f"{key.removesuffix('.weight')}: {error}") from error
    return Planned(name, blocks.kind, (layer.out_features, blocks.row_bytes), make)


def _dense(name: str, x: Tensor, heads: int | None) -> Planned:
    """Vectors go as float32, which is what llama.cpp has norms and biases in."""
    fits = {kind: exactly(x, dtype) for kind, dtype in TYPES.items()}
    kind = "F32" if x.ndim == 1 else next(kind for kind, y in fits.items() if y is not None)
    return Planned(name, kind, tuple(x.shape), lambda: _permuted(x.to(TYPES[kind]), heads))


def _heads(model: PreTrainedModel, key: str) -> int | None:
    """Into how many parts rows are cut, whose halves are then interleaved; None: they stay."""
    _, turned = ARCHITECTURES[type(model).__name__]
    if turned and ".q_proj." in key:
        return model.config.num_attention_heads
    return model.config.num_key_value_heads if turned and ".k_proj." in key else None


def _permuted(x: Shaped[Tensor, "m ..."], heads: int | None) -> Shaped[Tensor, "m ..."]:
    """Rows where llama.cpp wants them: it rotates neighbours, where transformers rotates halves."""
    return x if heads is None else x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
