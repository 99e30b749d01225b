"""The nearest points of the lattices E8P and E81B, and the points of codes."""

from quip.kernels.lattice_points.operations import decode, errors, nearest
from quip.kernels.lattice_points.reference import nearest_of, points_of
from quip.kernels.lattice_points.tables import E8P, E81B, Stage, code_dtype

__all__ = [
    "E8P",
    "E81B",
    "Stage",
    "code_dtype",
    "decode",
    "errors",
    "nearest",
    "nearest_of",
    "points_of",
]
