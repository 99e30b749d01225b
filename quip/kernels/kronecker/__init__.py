"""Rotate vectors by a Kronecker product of two small matrices, between two permutations."""

from quip.kernels.kronecker.operations import rotate, rotate_scaled

__all__ = ["rotate", "rotate_scaled"]
