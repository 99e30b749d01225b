"""Any decoder, block by block, with one block on the device at a time."""

from quip.walk.block import Block, walk
from quip.walk.coverage import Coverage, check_weights, coverage, find_blocks

__all__ = ["Block", "Coverage", "check_weights", "coverage", "find_blocks", "walk"]
