"""Rotate vectors by a Kronecker product of two small matrices, between two permutations."""

from quip.kernels.kronecker import cpu, cuda, reference
from quip.kernels.operation import Operation

rotate = Operation(reference.rotate, cuda=cuda.FORM, cpu=cpu.FORM)
