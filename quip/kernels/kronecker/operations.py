"""A rotation of vectors, alone, and with what stands around it when a matrix is applied."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quip.kernels.kronecker import cpu, cuda, reference
from quip.kernels.operation import Operation

rotate = Operation(reference.rotate, cuda=cuda.FORM, cpu=cpu.FORM)


def rotate_in_steps(
    x: Float[Tensor, "*batch n"],
    left: Float[Tensor, "p p"],
    right: Float[Tensor, "q q"],
    first: Int[Tensor, " n"] | None,
    last: Int[Tensor, " n"] | None,
    before: Float[Tensor, " n"] | None,
    after: Float[Tensor, " n"] | None,
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch n"]:
    """diag(after) P' (left (x) right^T) P diag(before) x in the dtype of left, rounded to dtype."""
    x = x.to(left.dtype)
    y = rotate(x if before is None else x * before, left, right, first, last)
    return (y if after is None else y * after).to(dtype)


rotate_scaled = Operation(rotate_in_steps, cuda=cuda.SCALED, cpu=cpu.SCALED)
