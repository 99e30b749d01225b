"""The matrices that one input feeds, quantized: one by one, or stacked."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quip.matrix.linalg import energy, proxy_loss
from quip.matrix.quantize import quantize_matrices, quantize_matrix
from quip.matrix.recipe import Recipe
from quip.matrix.seeds import rng_for
from quip.matrix.target import targets
from quip.model.block_module import BlockModule
from quip.model.matrices import Matrix
from quip.model.moments import Moments
from quip.model.plan import by_recipe
from quip.model.records import MatrixRecord
from quip.model.sides import Side
from quip.packed.linear import QuantizedLinear
from quip.packed.matrix import QuantizedMatrix
from quip.packed.stack import Stack, StackedLinear, in_order, stacked


def quantize_siblings(
    block: BlockModule,
    names: Sequence[str],
    moments: Moments,
    recipes: Mapping[str, Recipe],
    seed: int,
) -> Iterator[MatrixRecord]:
    """Quantize these matrices of a block, whose one input has these moments, in place.

    Each record comes as soon as its matrix is there; those of a stack come together. Only matrices
    of one recipe are stacked. Where the moments have an aim, its targets are what is rounded. How
    many tokens were seen is written down of experts.
    """
    found = block.matrices()
    for group in by_recipe(names, recipes):
        members, recipe = [found[name] for name in group], recipes[group[0]]
        rows = sum(matrix.rows for matrix in members)
        if recipe.stack and len(members) > 1 and recipe.can_do(rows, len(moments.H)):
            records = _quantize_stack(block, members, moments, recipe, seed)
        else:
            records = _quantize_each(block, members, moments, recipe, seed)
        for record in records:
            seen = moments.count if block.is_expert(record.name) else None
            yield replace(record, tokens=seen)


@dataclass(frozen=True)
class _Goal:
    """A matrix, and what it is rounded towards."""

    name: str
    W: Tensor
    target: Tensor
    alpha: Tensor | None = None  # how much of W* is in the target; None: it is W


def _goals(members: Sequence[Matrix], moments: Moments, recipe: Recipe) -> dict[str, _Goal]:
    weights = {matrix.name: matrix.weight.detach() for matrix in members}
    if moments.aim is None:
        return {name: _Goal(name, W, W) for name, W in weights.items()}
    found = targets(weights, moments.aim.lack, recipe.damp, moments.aim.alpha)
    return {name: _Goal(name, W, *found[name]) for name, W in weights.items()}


def _quantize_each(
    block: BlockModule, members: Sequence[Matrix], moments: Moments, recipe: Recipe, seed: int
) -> Iterator[MatrixRecord]:
    start, H = time.perf_counter(), moments.H
    goals = _goals(members, moments, recipe)
    biases = {matrix.name: matrix.bias for matrix in members}
    aims = {name: goal.target for name, goal in goals.items()}
    for name, quantized in quantize_matrices(aims, H, recipe, seed=seed, outputs=moments.outputs):
        side, f = moments.side and moments.side.of([name]), moments.outputs.get(name)
        quantized, sided = _judged(quantized, aims[name], H, recipe, seed, name, f, side)
        block.replace(name, QuantizedLinear.from_matrix(quantized, biases[name]))
        record = _record(
            *(goals[name], quantized.dequantize(), moments),
            block=block.index,
            damp=quantized.damp,
            bits_per_weight=quantized.bits_per_weight,
            two_sided=sided,
            seconds=0.0,
        )
        yield replace(record, seconds=time.perf_counter() - start)
        start = time.perf_counter()


def _quantize_stack(
    block: BlockModule, members: Sequence[Matrix], moments: Moments, recipe: Recipe, seed: int
) -> Iterator[MatrixRecord]:
    start, H = time.perf_counter(), moments.H
    by_name = {matrix.name: matrix for matrix in members}
    members = [by_name[name] for name in in_order([*by_name])]
    goals = _goals(members, moments, recipe)
    W, scales = stacked({name: goal.target for name, goal in goals.items()})
    key, felt = " ".join(goals), [moments.outputs.get(name) for name in goals]
    # y_i = s_i (rows of the stack): what is felt of y_i is felt of these s_i^2 times as much.
    parts = [
        s**2 * own.to(s.device) for s, own in zip(scales, felt, strict=True) if own is not None
    ]
    f, sizes = torch.cat(parts) if parts else None, [matrix.rows for matrix in members]
    quantized = quantize_matrix(W, H, recipe, rng=rng_for(seed, key), name=key, f=f)
    side = moments.side
    if side is not None:
        side = side.of([*goals]).scaled(scales.repeat_interleave(scales.new_tensor(sizes).long()))
    quantized, sided = _judged(quantized, W, H, recipe, seed, key, f, side)
    stack = Stack.of(quantized, scales, sizes)
    for index, matrix in enumerate(members):
        member = StackedLinear(stack, index, matrix.bias is not None, device="meta")
        member.bias = matrix.bias
        block.replace(matrix.name, member)
    decoded = stack.dequantize().split(list(stack.sizes))
    seconds = (time.perf_counter() - start) / len(members)
    for goal, W_hat in zip(goals.values(), decoded, strict=True):
        yield _record(
            *(goal, W_hat, moments),
            block=block.index,
            damp=quantized.damp,
            bits_per_weight=stack.bits_per_weight,
            two_sided=sided,
            seconds=seconds,
        )


def _judged(
    one: QuantizedMatrix,
    W: Tensor,
    H: Tensor,
    recipe: Recipe,
    seed: int,
    name: str,
    f: Tensor | None,
    side: Side | None,
) -> tuple[QuantizedMatrix, bool | None]:
    """What was rounded on one side, or on two where the windows held out lose less by that."""
    if side is None:
        return one, None
    two = quantize_matrix(*(W, H, recipe), rng=rng_for(seed, name), name=name, f=f, H_O=side.H_O)
    lost, less = (side.damage(found.dequantize() - W) for found in (one, two))
    return (two, True) if bool(less < lost) else (one, False)


def _record(goal: _Goal, W_hat: Tensor, moments: Moments, **known: Any) -> MatrixRecord:
    """What rounding it to W_hat came to."""
    (m, n), H = goal.W.shape, moments.H
    plain, square = moments.plain, moments.squares.get(goal.name)
    losses: dict[str, Any] = {"proxy_loss": proxy_loss(goal.W, W_hat, H)}
    if plain is not None:
        losses["plain_loss"] = proxy_loss(goal.W, W_hat, plain)
    if square is not None:
        error = energy(W_hat.double() - goal.W.double(), H)
        losses["damage"] = float(square) * error / (2 * m)
    if goal.alpha is not None:
        losses["target_loss"] = proxy_loss(goal.target, W_hat, H)
        losses["target_share"] = float(goal.alpha)
    return MatrixRecord(name=goal.name, rows=m, columns=n, **losses, **known)
