"""Trellis codes: the nearest walks, and the values of walks."""

from quip.kernels.operation import Operation
from quip.kernels.trellis import cpu, cuda, reference
from quip.kernels.trellis.reference import split
from quip.kernels.trellis.tables import ORDERS, Code, Tiling

__all__ = ["ORDERS", "Code", "Tiling", "decode", "encode", "round_columns", "split"]

encode = Operation(reference.encode, cuda=cuda.ENCODE, cpu=cpu.ENCODE)
decode = Operation(reference.decode, cuda=cuda.DECODE, cpu=cpu.DECODE)
round_columns = Operation(reference.round_columns, cpu=cpu.ROUND)
