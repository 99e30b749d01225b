"""Codebooks: the sets of values that weights are rounded to."""

from quip.codebooks.base import Codebook
from quip.codebooks.grid import MinMaxGrid, RmsGrid, around

__all__ = ["Codebook", "MinMaxGrid", "RmsGrid", "around"]
