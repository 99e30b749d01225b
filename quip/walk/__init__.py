"""Any decoder, block by block, with one block on the device at a time."""

from quip.walk.block import Block, batch_size_for, walk
from quip.walk.coverage import (
    Coverage,
    check_quantizable,
    check_weights,
    coverage,
    find_blocks,
)
from quip.walk.module import BlockModule, standing

__all__ = [
    "Block",
    "BlockModule",
    "Coverage",
    "batch_size_for",
    "check_quantizable",
    "check_weights",
    "coverage",
    "find_blocks",
    "standing",
    "walk",
]
