"""Multiply vectors by a packed matrix of integer grids, or decode it."""

from quip.kernels.grid_matvec import cpu, cuda, reference
from quip.kernels.operation import Operation

multiply = Operation(reference.multiply, cuda=cuda.MULTIPLY, cpu=cpu.FORM, decoded=cpu.DECODED)
decode = Operation(reference.decode_words, cuda=cuda.DECODE)
