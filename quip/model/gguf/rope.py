"""The rotary embeddings that a .gguf file describes, as the rope_parameters of a config.

llama.cpp takes the scaling from keys, and that of Llama 3 and Phi 3 from tensors of divisors, one
for each frequency. What they mean, and what holds where they are missing, is as it reads them.
"""

import math
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quip.errors import UnsupportedModel, shown

Words: TypeAlias = dict[str, Any]
FREE, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
CLOSE = 1e-4  # of one frequency to another, which files and models compute in float32
ORIGINALS = (8192, *(2**power for power in range(4, 21)))  # positions before they were stretched


def translate_rope(
    config: PretrainedConfig, own: Words, tensors: tuple[str, ...], path: Path
) -> set[str]:
    """Put the rotary embeddings into the config, and return the file's keys that say them.

    `own` is the metadata of the model without the architecture in front, `tensors` the names of
    the tensors in the file at `path`. Raises UnsupportedModel for rotations that transformers'
    model does not have.
    """
    keys = {key: value for key, value in own.items() if key.startswith("rope.")}
    divisors = {name: _read(path, name) for name in (FREE, SHORT, LONG) if name in tensors}
    scaling, used = _scaling(keys, divisors)
    ropes = getattr(config, "rope_parameters", None)
    plain = ropes and "full_attention" not in ropes and "rope.dimension_sections" not in keys
    if not plain and (scaling["rope_type"] not in ("default", "linear") or FREE in divisors):
        raise _unknown(keys, divisors)
    if not ropes or "rope.dimension_sections" in keys:  # none, or those that transformers reads
        if scaling["rope_type"] != "default":
            raise _unknown(keys, divisors)
        return used if ropes else set()
    before = ropes if plain else ropes["full_attention"]
    base = 10000.0 if plain else before["rope_theta"]
    rope = {"rope_theta": keys.get("rope.freq_base", base), **scaling}
    _set_width(rope, before, keys.get("rope.dimension_count"), own)
    if plain:
        config.rope_parameters = rope
    else:
        local = {**ropes["sliding_attention"]}
        local["rope_theta"] = keys.get("rope.freq_base_swa", local["rope_theta"])
        config.rope_parameters = {"full_attention": rope, "sliding_attention": local}
        used |= {"rope.freq_base_swa"}
    if FREE in divisors:
        _fit_llama3(config, divisors[FREE])
    return used | {"rope.freq_base", "rope.dimension_count"}


def _scaling(keys: Words, divisors: dict[str, Float32[Tensor, " pairs"]]) -> tuple[Words, set[str]]:
    """The scaling in transformers' words, and the keys that say it."""
    kind = keys.get("rope.scaling.type", "linear")
    named = "rope.scaling.factor" if "rope.scaling.factor" in keys else "rope.scale_linear"
    factor = keys.get(named) or 1.0
    original = keys.get("rope.scaling.original_context_length")
    used = {"rope.scaling.type", named, "rope.scaling.original_context_length"}
    plain = kind == "none" or (kind == "linear" and factor == 1.0)
    if plain and not divisors.keys() - {FREE}:
        return {"rope_type": "default"}, used
    if kind == "linear" and not divisors:
        return {"rope_type": "linear", "factor": factor}, used
    if kind == "yarn" and original and not divisors:
        words, more = _yarn(keys, factor)
    elif kind in ("linear", "longrope") and original and divisors.keys() == {SHORT, LONG}:
        words, more = _longrope(keys, divisors)
    else:
        raise _unknown(keys, divisors)
    return {**words, "original_max_position_embeddings": original}, used | more


def _yarn(keys: Words, factor: float) -> tuple[Words, set[str]]:
    factors = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
    others = {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
    fast, slow = (keys.get(key, value) for key, value in others.items())
    attention = math.prod(keys.get(key, 1.0) for key in factors)
    words = {"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow}
    words["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
    used = {*factors, *others}
    if keys.get("rope.scaling.yarn_ext_factor") == 1.0:
        used |= {"rope.scaling.yarn_ext_factor"}
    return words, used


def _longrope(
    keys: Words, divisors: dict[str, Float32[Tensor, " pairs"]]
) -> tuple[Words, set[str]]:
    return {
        "rope_type": "longrope",
        "short_factor": divisors[SHORT].tolist(),
        "long_factor": divisors[LONG].tolist(),
        "attention_factor": keys.get("rope.scaling.attn_factor", 1.0),
    }, {"rope.scaling.attn_factor"}


def _set_width(rope: Words, before: Words, width: int | None, own: Words) -> None:
    """How many numbers of a head are rotated: all, or the first `width` where a class can that."""
    head = own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"]
    share = (width or head) / head
    if "partial_rotary_factor" in before:
        rope["partial_rotary_factor"] = share
    elif share != 1:
        raise UnsupportedModel(f"it rotates {width} numbers of a head of {head}, and not the whole")


def _fit_llama3(config: PretrainedConfig, divisors: Float32[Tensor, " pairs"]) -> None:
    """Say the divisors of the frequencies as Llama 3.1 does. Raises UnsupportedModel for others."""
    rope, factor = config.rope_parameters, float(divisors.max())
    if float((divisors - 1).abs().max()) < CLOSE:
        return
    pairs = torch.arange(len(divisors), dtype=torch.float64) / len(divisors)
    wanted = rope["rope_theta"] ** -pairs / divisors
    words = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    for original in ORIGINALS:
        known = {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
        config.rope_parameters = {**rope, **words, **known}
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if found.shape == wanted.shape and torch.allclose(
            found.double(), wanted, rtol=CLOSE, atol=0
        ):
            return
    raise UnsupportedModel(
        f"its tensor {FREE} divides the frequencies by {shown(divisors.tolist())}, which is not "
        "how Llama 3.1 does"
    )


def _read(path: Path, tensor: str) -> Float32[Tensor, " pairs"]:
    from gguf import GGUFReader, dequantize

    held = next(x for x in GGUFReader(path).tensors if x.name == tensor)
    return torch.from_numpy(dequantize(held.data, held.tensor_type).copy()).float().flatten()


def _unknown(keys: Words, divisors: dict[str, Any]) -> UnsupportedModel:
    said = {key: value for key, value in keys.items() if "scal" in key} | dict.fromkeys(divisors)
    return UnsupportedModel(f"transformers has no rotary embeddings scaled as {shown(said)}")
