"""Multiply vectors by a matrix of packed lattice codes."""

from quip.kernels.lattice_matvec import cpu, cuda, reference
from quip.kernels.operation import Operation

multiply = Operation(reference.multiply, cuda=cuda.FORM, cpu=cpu.FORM, parts=reference.PARTS)
