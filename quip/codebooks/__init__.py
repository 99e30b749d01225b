"""Codebooks: the sets of values that weights are rounded to.

All but their names is imported when it is first used, so that a list of names needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quip.codebooks.names import CODEBOOKS, LATTICES

if TYPE_CHECKING:
    from quip.codebooks.base import Codebook, Decoder, Groups
    from quip.codebooks.grid import MinMaxGrid, RmsGrid, SymmetricGrid, candidate_rhos
    from quip.codebooks.grids import Grids
    from quip.codebooks.lattice import Lattice, Lattices
    from quip.codebooks.learned import Centroids, Learned
    from quip.codebooks.trellis import Trellis, Trellises

    DECODERS: dict[str, Any]  # by the name that a file gives them

_HOMES = {
    **dict.fromkeys(("Codebook", "Decoder", "Groups"), "base"),
    **dict.fromkeys(("MinMaxGrid", "RmsGrid", "SymmetricGrid", "candidate_rhos"), "grid"),
    "Grids": "grids",
    **dict.fromkeys(("Lattice", "Lattices"), "lattice"),
    **dict.fromkeys(("Centroids", "Learned"), "learned"),
    **dict.fromkeys(("Trellis", "Trellises"), "trellis"),
}

__all__ = [
    "CODEBOOKS",
    "DECODERS",
    "LATTICES",
    "Centroids",
    "Codebook",
    "Decoder",
    "Grids",
    "Groups",
    "Lattice",
    "Lattices",
    "Learned",
    "MinMaxGrid",
    "RmsGrid",
    "SymmetricGrid",
    "Trellis",
    "Trellises",
    "candidate_rhos",
]


def __getattr__(name: str) -> Any:
    if name == "DECODERS":
        globals()[name] = {row.home: _of(row.home, row.decoder) for row in CODEBOOKS.values()}
        return globals()[name]
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _of(_HOMES[name], name)


def _of(home: str, name: str) -> Any:
    return getattr(import_module(f"{__name__}.{home}"), name)
