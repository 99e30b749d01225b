"""Multiply vectors by a packed matrix of trellis codes, or decode it."""

from quip.kernels.operation import Operation
from quip.kernels.trellis_matvec import cpu, cuda, reference, squares

multiply = Operation(
    reference.multiply,
    cuda=cuda.MULTIPLY,
    cpu=cpu.FORM,
    squares=squares.FORM,
    decoded=cpu.DECODED,
    decoded_squares=squares.DECODED,
)
decode = Operation(reference.decode_words, cuda=cuda.DECODE, cpu=cpu.DECODE, squares=squares.DECODE)
