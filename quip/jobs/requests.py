"""What several jobs are asked for: how much text, which machine, and where results go.

A job's request inherits from these, so that each field, its default and its meaning stand once.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Text:
    """How much calibration text is sampled, and the seed of all that is drawn."""

    nsamples: int = 128
    seqlen: int | None = None  # None: the model's positions, at most 2048
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where to compute, and in what."""

    device: str | None = None  # None: cuda if there is one
    dtype: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder for what a job writes down as it goes."""

    out: Path | None = None
    overwrite: bool = False
