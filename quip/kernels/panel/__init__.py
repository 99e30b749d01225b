"""Round the columns of a panel to uniform grids, each with the errors of those before it."""

from quip.kernels.operation import Operation
from quip.kernels.panel import cpu, cuda, reference

round_columns = Operation(reference.round_columns, cuda=cuda.ROUND, cpu=cpu.ROUND)
fit_and_round_columns = Operation(
    reference.fit_and_round_columns, cuda=cuda.FIT_AND_ROUND, cpu=cpu.FIT_AND_ROUND
)
