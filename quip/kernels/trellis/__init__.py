"""Trellis codes: the nearest walks, and the values of walks."""

from quip.kernels.operation import Operation
from quip.kernels.trellis import cuda, reference
from quip.kernels.trellis.tables import ORDERS, Code, Tiling

__all__ = ["ORDERS", "Code", "Tiling", "decode", "encode"]

encode = Operation(reference.encode, cuda=cuda.ENCODE)
decode = Operation(reference.decode, cuda=cuda.DECODE)
