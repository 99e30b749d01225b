"""Rotate vectors by a Kronecker product of two small matrices, between two permutations."""

from quip.kernels.kronecker import cpu, reference
from quip.kernels.operation import Operation

rotate = Operation(reference.rotate, cpu=cpu.FORM)
