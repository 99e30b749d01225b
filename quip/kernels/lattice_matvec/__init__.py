"""Multiply vectors by a packed matrix of lattice codes, or decode it."""

from quip.kernels.lattice_matvec import cpu, cuda, reference
from quip.kernels.operation import Operation

multiply = Operation(reference.multiply, cuda=cuda.MULTIPLY, cpu=cpu.FORM, parts=reference.PARTS)
decode = Operation(reference.decode_words, cuda=cuda.DECODE)
