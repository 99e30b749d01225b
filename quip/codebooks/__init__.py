"""Codebooks: the sets of values that weights are rounded to."""

from typing import Any

from quip.codebooks.base import Codebook, Decoder, Groups
from quip.codebooks.grid import Grids, MinMaxGrid, RmsGrid, candidate_rhos
from quip.codebooks.lattice import LATTICES, Lattice, Lattices

DECODERS: dict[str, Any] = {
    "grid": Grids,
    "lattice": Lattices,
}  # by the name that a file gives them

__all__ = [
    "DECODERS",
    "LATTICES",
    "Codebook",
    "Decoder",
    "Grids",
    "Groups",
    "Lattice",
    "Lattices",
    "MinMaxGrid",
    "RmsGrid",
    "candidate_rhos",
]
