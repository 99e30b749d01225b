"""Which matrices of a model are quantized, and as what: enough to make room for their tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quip.errors import QuipError, Unavailable
from quip.packed.linear import QuantizedLinear, dense_linear, quantized_layers
from quip.packed.spec import Spec
from quip.packed.stack import Stack, StackedLinear, stacks

DAMAGED = "download or save it again"
WORDS = {"codebook": dict, "transforms": list, "modules": list}


@dataclass(frozen=True)
class Layout:
    """Names of modules, of one specification; a stack is the names of its members."""

    spec: Spec
    modules: tuple[str, ...]  # quantized alone
    stacks: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> "Layout":
        """The layout of a model's quantized matrices. Raises QuipError if they are of two kinds."""
        layers, stacked = quantized_layers(model), stacks(model)
        spec = next(iter(layers.values())).spec
        for name, layer in layers.items():
            if layer.spec != spec:
                raise QuipError(
                    f"{name} is quantized as {layer.spec.to_json()}, other matrices as "
                    f"{spec.to_json()}; one checkpoint holds matrices of one recipe"
                )
        alone = sorted(name for name, layer in layers.items() if not isinstance(layer, Stack))
        return cls(spec, tuple(alone), tuple(sorted(map(tuple, stacked))))

    @classmethod
    def from_json(cls, words: Mapping[str, Any]) -> "Layout":
        """Raises QuipError for words that are missing, or that this version does not know."""
        for name, kind in WORDS.items():
            if not isinstance(words.get(name), kind):
                raise QuipError(
                    f"the quantization_config of its config.json lacks {name!r} "
                    f"(a {kind.__name__}); {DAMAGED}"
                )
        spec = Spec.from_json(words["codebook"], words["transforms"])
        try:
            stacked = tuple(tuple(map(str, names)) for names in words.get("stacks") or ())
        except TypeError as error:
            raise QuipError(
                f"the 'stacks' of its config.json are {words['stacks']!r}, not lists of names; "
                + DAMAGED
            ) from error
        return cls(spec, tuple(sorted(map(str, words["modules"]))), stacked)

    def to_json(self) -> dict[str, Any]:
        words = {**self.spec.to_json(), "modules": list(self.modules)}
        return words | ({"stacks": [list(names) for names in self.stacks]} if self.stacks else {})

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all matrices, members of stacks one by one."""
        return (*self.modules, *(name for names in self.stacks for name in names))

    def make_room(self, model: nn.Module) -> None:
        """Put empty packed modules, on the meta device, where the model has its nn.Linear.

        Raises Unavailable, naming the module, where it has none.
        """
        for name in self.modules:
            old = _linear(model, name)
            _replace(model, name, empty_like(old, self.spec))
        for names in self.stacks:
            old_ones = {name: _linear(model, name) for name in names}
            for name, new in stack_like(old_ones, self.spec).items():
                _replace(model, name, new)


def empty_like(old: nn.Linear, spec: Spec) -> QuantizedLinear:
    """A packed module of the sizes of an nn.Linear, on the meta device."""
    return QuantizedLinear(
        old.in_features,
        old.out_features,
        old.bias is not None,
        spec=spec,
        device="meta",
        dtype=old.weight.dtype,
    )


def stack_like(old: Mapping[str, nn.Linear], spec: Spec) -> dict[str, StackedLinear]:
    """The members of an empty stack of the sizes of these, on the meta device."""
    n = {linear.in_features for linear in old.values()}
    if len(n) != 1:
        raise Unavailable(
            f"config.json says that {', '.join(old)} are one stack, but they read inputs of "
            f"{sorted(n)} numbers; {DAMAGED}"
        )
    stack = Stack(n.pop(), [x.out_features for x in old.values()], spec=spec, device="meta")
    return {
        name: StackedLinear(
            stack, i, linear.bias is not None, device="meta", dtype=linear.weight.dtype
        )
        for i, (name, linear) in enumerate(old.items())
    }


def dense(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with an nn.Linear of the same W_hat, rounded to dtype, for each packed matrix."""
    for members in stacks(model):
        (_, first), *_ = members.items()
        parts = first.whole.dequantize().split(list(first.whole.sizes))
        for (name, member), W in zip(members.items(), parts, strict=True):
            _replace(model, name, dense_linear(W, member.bias, dtype).train(member.training))
    for name, layer in quantized_layers(model).items():
        _replace(model, name, layer.to_linear(dtype).train(layer.training))
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    model.set_submodule(name, module, strict=True)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        what = "there is no such module" if module is None else f"it is a {type(module).__name__}"
        raise Unavailable(
            f"config.json says that {name} is a quantized matrix, but in a {type(model).__name__} "
            f"{what}; {DAMAGED}"
        )
    return module
