"""Rotation by a Hadamard matrix: Omega = (K x S) / sqrt(n), K of the smallest order that fits.

Each factor of the Kronecker product is one cheap pass, and random signs D make the rotation
D Omega. reference.py multiplies with a small matrix in each pass; cpu.cpp does it all in one call
for float32 and float64 on a CPU. A gradient is a rotation back, by any form.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from quip.kernels.hadamard import cpu, reference
from quip.kernels.operation import Operation

HALVES = (torch.float16, torch.bfloat16)
turn = Operation(reference.turn, cpu=cpu.FORM)


def rotate(
    x: Float[Tensor, "*batch n"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """D Omega x on the last axis, Omega = (K x S) / sqrt(n), the index of K the outer one.

    D is the diagonal matrix of the signs, which may be any numbers; without them it is I. With a
    block, Omega is block diagonal: n / block times the Omega of that width. Raises UsageError as
    `check` does.
    """
    return _turned(x, signs, block, rows=False, transpose=False)


def invert(
    x: Float[Tensor, "*batch n"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """Omega^T D x on the last axis: `rotate` undone where all signs are +-1."""
    return _turned(x, signs, block, rows=False, transpose=True)


def rotate_rows(
    W: Float[Tensor, "n m"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "n m"]:
    """D Omega W."""
    return _turned(W, signs, block, rows=True, transpose=False)


def invert_rows(
    W: Float[Tensor, "n m"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "n m"]:
    """Omega^T D W."""
    return _turned(W, signs, block, rows=True, transpose=True)


def _turned(
    x: Tensor, signs: Tensor | None, block: int | None, *, rows: bool, transpose: bool
) -> Tensor:
    """`turn` in any dtype, and with gradients."""
    given = x.dtype
    if x.device.type == "cpu" and given in HALVES:
        x = x.float()  # faster there, and rounded once
    if signs is not None:
        signs = signs.to(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, signs)):
        y = _differentiable(x, signs, block, rows, transpose)
    else:
        y = turn(x, signs, block, rows=rows, transpose=transpose)
    return y if y.dtype is given else y.to(given)


def _differentiable(
    x: Tensor, signs: Tensor | None, block: int | None, rows: bool, transpose: bool
) -> Tensor:
    """The signs before or after a rotation without any."""
    if signs is None:
        return _Rotation.apply(x, block, rows, transpose)
    signs = signs[:, None] if rows else signs
    if transpose:
        return _Rotation.apply(x * signs, block, rows, True)
    return _Rotation.apply(x, block, rows, False) * signs


class _Rotation(torch.autograd.Function):
    """Omega x or Omega^T x by any form. The gradient of Omega x is Omega^T g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int | None, rows: bool, transpose: bool) -> Tensor:
        ctx.how = block, rows, transpose
        return turn(x, None, block, rows=rows, transpose=transpose)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        block, rows, transpose = ctx.how
        return _turned(g, None, block, rows=rows, transpose=not transpose), None, None, None
