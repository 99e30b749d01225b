"""Multiply vectors by a matrix of packed codes of integer grids."""

from quip.kernels.grid_matvec import cpu, cuda, reference
from quip.kernels.operation import Operation

multiply = Operation(reference.multiply, cuda=cuda.FORM, cpu=cpu.FORM)
