"""Rotation by a Hadamard matrix of any order that a model needs, and what it is made of."""

from quip.kernels.hadamard.matrices import check
from quip.kernels.hadamard.rotations import invert, invert_rows, rotate, rotate_rows

__all__ = ["check", "invert", "invert_rows", "rotate", "rotate_rows"]
