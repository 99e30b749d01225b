"""Round the columns of a panel to a lattice, each with the errors of those before it."""

from quip.kernels.lattice_panel import cuda, reference
from quip.kernels.lattice_panel.reference import fitted_scale
from quip.kernels.operation import Operation

__all__ = ["fit_and_round_blocks", "fitted_scale", "round_blocks"]

round_blocks = Operation(reference.round_blocks, cuda=cuda.ROUND)
fit_and_round_blocks = Operation(reference.fit_and_round_blocks, cuda=cuda.FIT_AND_ROUND)
