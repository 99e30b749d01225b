"""The operations on lattice points. `error` rounds and decodes by the fastest form of each."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from quip.kernels.lattice_points import cpu, reference
from quip.kernels.lattice_points.tables import DIM, Stage
from quip.kernels.operation import Operation

CHUNK = 2**19  # weights whose error is measured at once

nearest = Operation(reference.nearest, cpu=cpu.NEAREST)
decode = Operation(reference.decode, cpu=cpu.DECODE)


def error_by_rounding(
    X: Float[Tensor, "m n"],
    h: Float[Tensor, " n"],
    stages: Sequence[Stage],
    *,
    scale: Float[Tensor, ""],
    ratio: float | None,
    chunk: int = CHUNK,
) -> float:
    """The sum of h_k |x_k - w_hat_k|^2 over all columns, where w_hat is what X is rounded to."""
    total = 0.0
    for rows in X.split(max(1, chunk // X.shape[1])):
        x = rows.reshape(-1, DIM)
        codes = nearest(x, stages, scale=scale, ratio=ratio)
        w_hat = decode(codes[:, None], stages, scale[None], group=None, ratio=ratio)
        total += float((x - w_hat).reshape(rows.shape).square_().sum(0) @ h)
    return total


error = Operation(error_by_rounding, cpu=cpu.ERROR)
