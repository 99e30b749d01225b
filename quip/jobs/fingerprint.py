"""What the codes of a run depend on."""

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
import xxhash

from quip.data import TokenSet
from quip.data.hessians import HessianStore
from quip.jobs.requests import NO_WEIGHTS, Calibration
from quip.matrix.recipe import Recipe
from quip.model.load import LoadedModel
from quip.model.plan import Plan, described
from quip.model.records import versions
from quip.model.tune import BlockTuning
from quip.packed.digests import digest_of_state

NOTHING: Mapping[str, Any] = MappingProxyType({})
Source: TypeAlias = TokenSet | HessianStore  # what tells of the inputs of matrices


def fingerprint_of(
    loaded: LoadedModel,
    source: Source,
    how: Recipe | Plan | None,
    tuning: BlockTuning | None = None,
    *,
    asked: Calibration,
    device: torch.device,
    exact: bool = True,
    beside: Mapping[str, Any] = NOTHING,
) -> dict[str, Any]:
    """All that the codes of a run depend on, fit for JSON; what is short comes first.

    `beside` are other options of the run by name, of which those that are not set are left out.
    They do not depend on the number of processes where second moments are summed `exact`ly.
    """
    found = versions()
    return {
        **described(how),
        "tuning": tuning and asdict(tuning),
        **{name: value for name, value in beside.items() if value},
        "seed": asked.seed,
        **({"all_experts": True} if asked.all_experts else {}),
        **({"token_weights": asked.token_weights} if asked.token_weights != NO_WEIGHTS else {}),
        "dtype": loaded.dtype_name,
        "device": device.type,
        "versions": {name: found.get(name) for name in ("quip-quant", "torch")},
        "calibration": source.stamp,
        "hessians": source.digest if isinstance(source, HessianStore) else None,
        "model": identity_of(loaded),
        "sums": "exact" if exact else "fast",
    }


def identity_of(loaded: LoadedModel) -> dict[str, str]:
    """Which model it is: its class, and hashes of its config and its weights."""
    model, stream = loaded.model, loaded.stream
    return {
        "class": type(model).__name__,
        "config": xxhash.xxh3_128(model.config.to_json_string().encode()).hexdigest(),
        "weights": stream.digest(model) if stream else digest_of_state(model.state_dict().items()),
    }
