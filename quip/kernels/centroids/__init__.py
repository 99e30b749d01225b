"""Learned centroids: the nearest ones of vectors, and the means of those vectors."""

from quip.kernels.centroids import cpu, reference
from quip.kernels.operation import Operation

assign = Operation(reference.assign, cpu=cpu.ASSIGN)
improve = Operation(reference.improve, cpu=cpu.IMPROVE)
round_columns = Operation(reference.round_columns, cpu=cpu.ROUND)
