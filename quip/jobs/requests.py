"""What several jobs are asked for: how much text, which machine, and where results go.

A job's request inherits from these, so that each field, its default and its meaning stand once.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

Request = TypeVar("Request")
NO_WEIGHTS = "none"
NO_SIDES_OF_A_STORE = (
    "--two_sided with --hessians: it needs gradients, and a store has only second moments of "
    "inputs; give DATASET instead, or leave out --two_sided"
)
NO_TARGET_OF_A_STORE = (
    "--target_shrink {shrink} with --hessians: targets compare what the model and the original "
    "pass on, of which a store has nothing; give DATASET instead, or leave out --target_shrink"
)


@dataclass(frozen=True, kw_only=True)
class Text:
    """How much calibration text is sampled, and the seed of all that is drawn."""

    nsamples: int = 128
    seqlen: int | None = None  # None: the model's positions, at most 2048
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Calibration(Text):
    """What second moments are taken over."""

    all_experts: bool = False  # of each expert all tokens, not those that the router sends to it
    token_weights: str = NO_WEIGHTS  # by the loss, with labels: none, fisher or labels


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where to compute, and in what."""

    device: str | None = None  # None: cuda if there is one
    dtype: str = "auto"
    fast_reduce: bool = False  # second moments summed as they come, not to the same bits
    stream: str = "auto"  # on, off, or auto: what is too large for memory goes block by block


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder for what a job writes down as it goes."""

    out: Path | None = None
    overwrite: bool = False


def request(kind: type[Request], known: object, **own: Any) -> Request:
    """A request of this kind, a dataclass: what `known` has by the names of its fields, and `own`.

    `known` is a parsed line, or another request. `own` are fields that it has not, or not as they
    are wanted; they win.
    """
    names = (field.name for field in fields(cast(Any, kind)))
    found = {name: getattr(known, name) for name in names if hasattr(known, name)}
    return kind(**{**found, **own})
