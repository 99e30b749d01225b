"""Multiply vectors by a packed matrix of trellis codes, or decode it."""

from quip.kernels.operation import Operation
from quip.kernels.trellis_matvec import cuda, reference

multiply = Operation(reference.multiply, cuda=cuda.MULTIPLY)
decode = Operation(reference.decode_words, cuda=cuda.DECODE)
