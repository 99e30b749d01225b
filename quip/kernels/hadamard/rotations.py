"""Rotation by a Hadamard matrix: Omega = (K x S) / sqrt(n), K of the smallest order that fits.

Each factor of the Kronecker product is one cheap pass, and random signs D make the rotation
D Omega. reference.py multiplies with a small matrix in each pass; cpu.cpp does it all in one call
for float32 and float64 on a CPU, and cuda.cu in one launch on CUDA, casts and a bias included. A
gradient is a rotation back, by any form.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from quip.kernels.hadamard import cpu, cuda, reference
from quip.kernels.operation import Operation, learns

turn = Operation(reference.turn, cuda=cuda.FORM, cpu=cpu.FORM)


def turn_in_steps(
    x: Float[Tensor, "*batch n"],
    signs: Float[Tensor, " n"] | None,
    bias: Float[Tensor, " n"] | None,
    block: int | None,
    *,
    transpose: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch n"]:
    """D Omega x + bias or Omega^T D x + bias, in float32 at least until it is cast to dtype."""
    x = x.to(_wide(x))
    signs = None if signs is None else signs.to(x)
    y = turn(x, signs, block, rows=False, transpose=transpose)
    return (y if bias is None else y + bias).to(dtype)


turn_vectors = Operation(turn_in_steps, cuda=cuda.VECTORS)


def rotate(
    x: Float[Tensor, "*batch n"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
    bias: Float[Tensor, " n"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch n"]:
    """D Omega x + bias on the last axis, Omega = (K x S) / sqrt(n), the index of K the outer one.

    D is the diagonal matrix of the signs, which may be any numbers; without them it is I. With a
    block, Omega is block diagonal: n / block times the Omega of that width. What comes back is
    rounded once, to dtype, that of x by default. Raises UsageError as `check` does.
    """
    return _turned_vectors(x, signs, bias, block, transpose=False, dtype=dtype)


def invert(
    x: Float[Tensor, "*batch n"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch n"]:
    """Omega^T D x on the last axis, in dtype: `rotate` undone where all signs are +-1."""
    return _turned_vectors(x, signs, None, block, transpose=True, dtype=dtype)


def rotate_rows(
    W: Float[Tensor, "n m"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "n m"]:
    """D Omega W."""
    return _turned_rows(W, signs, block, transpose=False)


def invert_rows(
    W: Float[Tensor, "n m"],
    *,
    block: int | None = None,
    signs: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "n m"]:
    """Omega^T D W."""
    return _turned_rows(W, signs, block, transpose=True)


def _turned_vectors(
    x: Tensor,
    signs: Tensor | None,
    bias: Tensor | None,
    block: int | None,
    *,
    transpose: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """`turn_vectors`, and with gradients."""
    dtype = x.dtype if dtype is None else dtype
    if not learns(x, signs, bias):
        return turn_vectors(x, signs, bias, block, transpose=transpose, dtype=dtype)
    y = _differentiable(x.to(_wide(x)), signs, block, False, transpose)
    return (y if bias is None else y + bias).to(dtype)


def _turned_rows(W: Tensor, signs: Tensor | None, block: int | None, *, transpose: bool) -> Tensor:
    """`turn` of rows in any dtype, and with gradients."""
    wide = W.to(_wide(W))
    if learns(W, signs):
        return _differentiable(wide, signs, block, True, transpose).to(W.dtype)
    signs = None if signs is None else signs.to(wide)
    return turn(wide, signs, block, rows=True, transpose=transpose).to(W.dtype)


def _wide(x: Tensor) -> torch.dtype:
    """Float32 at least: exact enough for long sums, and rounded once."""
    return torch.promote_types(x.dtype, torch.float32)


def _differentiable(
    x: Tensor, signs: Tensor | None, block: int | None, rows: bool, transpose: bool
) -> Tensor:
    """The signs before or after a rotation without any."""
    if signs is None:
        return _Rotation.apply(x, block, rows, transpose)
    signs = signs.to(x)[:, None] if rows else signs.to(x)
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
        if rows:
            return _turned_rows(g, None, block, transpose=not transpose), None, None, None
        turned = _turned_vectors(g, None, None, block, transpose=not transpose, dtype=None)
        return turned, None, None, None
