"""Codebooks: the sets of values that weights are rounded to."""

from typing import Any

from quip.codebooks.base import Codebook, Decoder, Groups
from quip.codebooks.grid import Grids, MinMaxGrid, RmsGrid, around

DECODERS: dict[str, Any] = {"grid": Grids}  # by the name that a file gives them

__all__ = ["DECODERS", "Codebook", "Decoder", "Grids", "Groups", "MinMaxGrid", "RmsGrid", "around"]
