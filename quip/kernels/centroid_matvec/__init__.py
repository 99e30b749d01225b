"""Multiply vectors by a matrix of packed codes of learned codebooks."""

from quip.kernels.centroid_matvec import cpu, reference
from quip.kernels.operation import Operation

decode = reference.decode
multiply = Operation(reference.multiply, cpu=cpu.FORM, parts=reference.PARTS)
