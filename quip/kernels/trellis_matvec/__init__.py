"""Multiply vectors by a packed matrix of trellis codes, or decode it."""

from quip.kernels.operation import Operation
from quip.kernels.trellis_matvec import cuda, reference, squares

multiply = Operation(
    reference.multiply,
    cuda=cuda.MULTIPLY,
    squares=squares.FORM,
    decoded_squares=squares.DECODED,
)
decode = Operation(reference.decode_words, cuda=cuda.DECODE, squares=squares.DECODE)
