"""What a checkpoint may not say although its words and shapes are in order."""

import re
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quip.errors import NonFinite, Unavailable, shown
from quip.packed.files import DAMAGED
from quip.packed.linear import quantized_layers

MODULES = 1024  # of a kind; a model of more takes minutes to make, and there is none
COUNT = re.compile(r"(moe_)?(num|n|encoder|decoder)(_\w+)?_(layers?|experts|blocks)|layers|depth")

CHOSEN = "num_experts_per_tok"
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of which a config has one


def check_counts(config: PretrainedConfig) -> None:
    """Raise Unavailable for a config of a model of more layers or experts than any has.

    Also where each token is to go to more experts than there are.
    """
    for key, value in _entries(config.to_dict()):
        if COUNT.fullmatch(str(key)) and isinstance(value, int) and value > MODULES:
            raise Unavailable(
                f"its config.json says {key}: {shown(value)}, and models of up to {MODULES} are "
                f"read; {DAMAGED}"
            )
    text = config.get_text_config(decoder=True)
    chosen = getattr(text, CHOSEN, None)
    there = [x for name in EXPERTS if isinstance(x := getattr(text, name, None), int) and x > 1]
    if there and isinstance(chosen, int) and chosen > max(there):
        raise Unavailable(
            f"its config.json says {CHOSEN}: {chosen}, and there are {max(there)} experts; "
            f"{DAMAGED}"
        )


def _entries(words: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Keys with their values, those of configs inside the config as well."""
    for key, value in words.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)


def check_left_over(model: nn.Module, names: Set[str]) -> None:
    """Raise Unavailable where files hold tensors of a packed matrix that config.json leaves out.

    transformers only warns of what is left over, and would compute something else.
    """
    layers, left = quantized_layers(model), names - model.state_dict().keys()
    for key in sorted(left):
        name = key.rpartition(".")[0]
        if name in layers or f"{name}.codes" in left:
            raise Unavailable(
                f"{shown(key)}: the files hold it, and config.json names no quantized matrix with "
                f"such a tensor; {DAMAGED}"
            )


def check_finite(model: nn.Module, remedy: str = DAMAGED) -> None:
    """Raise NonFinite, naming the tensor, for NaN or infinity in what is not packed.

    The packed tensors are looked at when they are unpacked. Tensors that stayed in a file are left.
    """
    layers = quantized_layers(model)
    packed = {f"{name}.{key}" for name, layer in layers.items() for key in layer.stored()}
    seen: set[tuple[int, torch.Size]] = set()  # tied tensors are looked at once
    for name, tensor in model.state_dict().items():
        key = tensor.data_ptr(), tensor.shape
        if name in packed or key in seen or tensor.is_meta:
            continue
        seen.add(key)
        if not is_finite(tensor):
            half = tensor.dtype == torch.float16
            wider = ", or numbers beyond its range: give --dtype bfloat16" if half else ""
            raise NonFinite(f"{name}: it holds NaN or infinity, as {tensor.dtype}{wider}; {remedy}")


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if not x.is_floating_point() or not x.numel():
        return True
    # One pass and no copy; both ends are NaN if any number is.
    low, high = torch.aminmax(x)
    return bool(low.isfinite() & high.isfinite())
