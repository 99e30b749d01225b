"""Hessians of tiny models, and stores of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quip.data.hessians import StoreWriter
from quip.matrix.hessian import Hessian
from quip.model.walk import walk
from tests.support.tiny import tiny, tokens

FACTS = {
    "model": "tiny",
    "digest": {},
    "dtype": "float32",
    "source": "original",
    "calibration": {"dataset": "random"},
}


def observed(name: str = "opt") -> list[dict[str, Hessian]]:
    """The Hessians of each block of a tiny model."""
    return [block.observe() for block in walk(tiny(name), tokens(), device="cpu")]


def written(
    folder: Path,
    blocks: list[dict[str, Hessian]],
    *,
    close: bool = True,
    facts: Mapping[str, Any] = FACTS,
) -> StoreWriter:
    """The writer of a store with these blocks, which is complete unless it was not closed."""
    writer = StoreWriter(folder, facts)
    for index, hessians in enumerate(blocks):
        writer.keep(index, hessians)
    if close:
        writer.close()
    return writer
