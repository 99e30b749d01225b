"""What a plan is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quip.codebooks.names import Bits
from quip.jobs.requests import Machine, Text


@dataclass(frozen=True, kw_only=True)
class Planning(Text, Machine):
    """Everything that a plan depends on."""

    model: str
    out: Path
    bits: float  # of all that is stored of the quantized matrices, per weight
    choices: Mapping[Bits, Mapping[str, Any]]  # the flags of each width
    by: str = "fisher"
    dataset: str | None = None
    whole_stacks: bool = False
    head_bits: int | None = None  # of embedding and head, beside the budget; None: they stay
    checkpoints: tuple[str, ...] = ()
    overwrite: bool = False
    line: str = ""  # that asked for it, for the head of the file
