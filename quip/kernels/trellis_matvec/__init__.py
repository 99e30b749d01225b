"""Multiply vectors by a packed matrix of trellis codes, or decode it."""

from quip.kernels.operation import Operation
from quip.kernels.trellis_matvec import reference

multiply = Operation(reference.multiply)
decode = Operation(reference.decode_words)
