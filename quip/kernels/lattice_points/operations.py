"""The operations on lattice points. `errors` rounds and decodes by the fastest form of each."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from quip.kernels.lattice_points import cpu, cuda, reference
from quip.kernels.lattice_points.tables import DIM, Stage
from quip.kernels.operation import Operation

CHUNK = 2**19  # weights whose error is measured at once

nearest = Operation(reference.nearest, cuda=cuda.NEAREST, cpu=cpu.NEAREST)
decode = Operation(reference.decode, cuda=cuda.DECODE, cpu=cpu.DECODE)


def errors_by_rounding(
    X: Float[Tensor, "m n"],
    h: Float[Tensor, " n"],
    stages: Sequence[Stage],
    *,
    scales: Float[Tensor, " scales"],
    ratio: float | None,
    chunk: int = CHUNK,
) -> Float64[Tensor, " scales"]:
    """The sums of h_k |x_k - w_hat_k|^2 over all columns, where w_hat is what X is rounded to.

    One for each of the scales.
    """
    totals = torch.zeros(len(scales), dtype=torch.float64, device=X.device)
    for total, scale in zip(totals, scales, strict=True):
        for rows in X.split(max(1, chunk // X.shape[1])):
            x = rows.reshape(-1, DIM)
            codes = nearest(x, stages, scale=scale, ratio=ratio)
            w_hat = decode(codes[:, None], stages, scale[None], group=None, ratio=ratio)
            total += (x - w_hat).reshape(rows.shape).square_().sum(0) @ h
    return totals


errors = Operation(errors_by_rounding, cuda=cuda.ERRORS, cpu=cpu.ERRORS)
