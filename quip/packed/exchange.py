"""Modules of a model exchanged: dense matrices for empty packed ones, and packed for dense."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quip.errors import Unavailable
from quip.packed.embedding import QuantizedEmbedding, TiedHead, tied_heads
from quip.packed.experts import fuse
from quip.packed.files import DAMAGED
from quip.packed.linear import QuantizedLinear, dense_linear, quantized_layers
from quip.packed.spec import Spec
from quip.packed.stack import Stack, StackedLinear, stacks


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where the model has another; a packed one remembers whether that is a Conv1D."""
    if isinstance(module, QuantizedLinear | StackedLinear):
        old = model.get_submodule(name)
        module.is_conv1d = isinstance(old, Conv1D) or getattr(old, "is_conv1d", False)
    model.set_submodule(name, module, strict=True)


def matrix_at(model: nn.Module, name: str) -> nn.Linear | Conv1D:
    """The module of a matrix that config.json names. Raises Unavailable where there is none."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | Conv1D):
        what = "there is no such module" if module is None else f"it is a {type(module).__name__}"
        raise Unavailable(
            f"config.json says that {name} is a quantized matrix, but in a {type(model).__name__} "
            f"{what}; {DAMAGED}"
        )
    return module


def embedding_at(model: nn.Module, name: str) -> nn.Embedding:
    """The embedding that config.json names. Raises Unavailable where there is none."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if type(module) is not nn.Embedding:
        raise Unavailable(
            f"config.json says that {name} is a quantized embedding, and in a "
            f"{type(model).__name__} it is none; {DAMAGED}"
        )
    return module


def embedding_like(old: nn.Embedding, spec: Spec) -> QuantizedEmbedding:
    """A packed embedding of the sizes of a dense one, on the meta device."""
    rows, columns = old.weight.shape
    return QuantizedEmbedding(columns, rows, spec=spec, device="meta", dtype=old.weight.dtype)


def head_like(old: nn.Linear | Conv1D, embedding: nn.Module) -> TiedHead:
    """A head of a packed embedding in place of a dense one, on the meta device."""
    assert isinstance(embedding, QuantizedEmbedding)
    if _sizes(old) != (embedding.in_features, embedding.out_features):
        raise Unavailable(
            f"config.json says that a head of {_sizes(old)[1]} outputs is tied to an embedding of "
            f"{embedding.out_features} rows; {DAMAGED}"
        )
    return TiedHead(embedding, old.bias is not None, device="meta", dtype=old.weight.dtype)


def empty_like(old: nn.Linear | Conv1D, spec: Spec) -> QuantizedLinear:
    """A packed module of the sizes of a dense one, on the meta device."""
    inputs, outputs = _sizes(old)
    biased, dtype = old.bias is not None, old.weight.dtype
    return QuantizedLinear(inputs, outputs, biased, spec=spec, device="meta", dtype=dtype)


def stack_like(old: Mapping[str, nn.Linear | Conv1D], spec: Spec) -> dict[str, StackedLinear]:
    """The members of an empty stack of the sizes of these, on the meta device."""
    inputs, outputs = zip(*map(_sizes, old.values()), strict=True)
    if len({*inputs}) != 1:
        raise Unavailable(
            f"config.json says that {', '.join(old)} are one stack, but they read inputs of "
            f"{sorted({*inputs})} numbers; {DAMAGED}"
        )
    stack = Stack(inputs[0], outputs, spec=spec, device="meta")
    return {
        name: StackedLinear(
            stack, i, module.bias is not None, device="meta", dtype=module.weight.dtype
        )
        for i, (name, module) in enumerate(old.items())
    }


def dense(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with what transformers has for each packed matrix, of the same W_hat in dtype.

    That is an nn.Linear or a Conv1D; experts are fused again.
    """
    for members in stacks(model):
        (_, first), *_ = members.items()
        parts = first.whole.dequantize().split(list(first.whole.sizes))
        for (name, member), W in zip(members.items(), parts, strict=True):
            replace(model, name, _dense(member, W, dtype))
    tied = tied_heads(model)
    for name, layer in quantized_layers(model).items():
        W = layer.dequantize()
        made = _looked_up(W, dtype) if isinstance(layer, QuantizedEmbedding) else None
        replace(model, name, made or _dense(layer, W, dtype))
    for head, name in tied.items():
        _tie(model, head, model.get_submodule(name))
    fuse(model)
    name_by_kind(model)
    return model


def name_by_kind(model: nn.Module) -> None:
    """Let a model be saved under the names of its kind. Ours are loaded without renaming."""
    if not getattr(model, "_weight_conversions", True):
        del model._weight_conversions


def _dense(layer: QuantizedLinear | StackedLinear, W: Tensor, dtype: torch.dtype) -> nn.Module:
    made = dense_linear(W, layer.bias, dtype)
    return (_conv1d(made) if layer.is_conv1d else made).train(layer.training)


def _looked_up(W: Tensor, dtype: torch.dtype) -> nn.Embedding:
    rows, columns = W.shape
    made = nn.Embedding(rows, columns, device="meta")
    made.weight = nn.Parameter(W.to(dtype), requires_grad=False)
    return made


def _tie(model: Any, head: str, embedding: nn.Module) -> None:
    """Put a dense head in place of a tied one, of the weights of the embedding."""
    old = model.get_submodule(head)
    made = dense_linear(
        embedding.get_parameter("weight"), old.bias, embedding.get_parameter("weight").dtype
    )
    made.weight = embedding.get_parameter("weight")
    replace(model, head, made.train(old.training))
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = True
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _conv1d(linear: nn.Linear) -> Conv1D:
    with torch.device("meta"):
        made = Conv1D(linear.out_features, linear.in_features)
    made.weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=False)
    made.bias = linear.bias
    return made


def _sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """The numbers of inputs and outputs."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features
