"""The matrices that one input feeds, quantized: one by one, or stacked."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quip.matrix.linalg import energy, proxy_loss
from quip.matrix.quantize import quantize_matrices, quantize_matrix
from quip.matrix.recipe import Recipe
from quip.matrix.seeds import rng_for
from quip.model.block import BlockModule
from quip.model.matrices import Matrix
from quip.model.moments import Moments
from quip.model.plan import by_recipe
from quip.model.records import MatrixRecord
from quip.packed.linear import QuantizedLinear
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
    of one recipe are stacked. How many tokens were seen is written down of experts.
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


def _quantize_each(
    block: BlockModule, members: Sequence[Matrix], moments: Moments, recipe: Recipe, seed: int
) -> Iterator[MatrixRecord]:
    H = moments.H
    weights = {matrix.name: matrix.weight.detach() for matrix in members}
    biases = {matrix.name: matrix.bias for matrix in members}
    start = time.perf_counter()
    for name, quantized in quantize_matrices(
        weights, H, recipe, seed=seed, outputs=moments.outputs
    ):
        block.replace(name, QuantizedLinear.from_matrix(quantized, biases[name]))
        W, bits = weights[name], quantized.bits_per_weight
        losses = _losses(name, W, quantized.dequantize(), moments)
        seconds = time.perf_counter() - start
        yield _record(name, block.index, W, losses, quantized.damp, bits, seconds)
        start = time.perf_counter()


def _quantize_stack(
    block: BlockModule, members: Sequence[Matrix], moments: Moments, recipe: Recipe, seed: int
) -> Iterator[MatrixRecord]:
    H = moments.H
    start, by_name = time.perf_counter(), {matrix.name: matrix for matrix in members}
    members = [by_name[name] for name in in_order([*by_name])]
    weights = {matrix.name: matrix.weight.detach() for matrix in members}
    W, scales = stacked(weights)
    key, felt = " ".join(weights), [moments.outputs.get(name) for name in weights]
    # y_i = s_i (rows of the stack): what is felt of y_i is felt of these s_i^2 times as much.
    f = [s**2 * own.to(s.device) for s, own in zip(scales, felt, strict=True) if own is not None]
    quantized = quantize_matrix(
        *(W, H, recipe), rng=rng_for(seed, key), name=key, f=torch.cat(f) if f else None
    )
    stack = Stack.of(quantized, scales, [len(W) for W in weights.values()])
    for index, matrix in enumerate(members):
        member = StackedLinear(stack, index, matrix.bias is not None, device="meta")
        member.bias = matrix.bias
        block.replace(matrix.name, member)
    parts = stack.dequantize().split(list(stack.sizes))
    seconds = (time.perf_counter() - start) / len(members)
    for (name, W), W_hat in zip(weights.items(), parts, strict=True):
        losses, bits = _losses(name, W, W_hat, moments), stack.bits_per_weight
        yield _record(name, block.index, W, losses, quantized.damp, bits, seconds)


def _losses(name: str, W: Tensor, W_hat: Tensor, moments: Moments) -> dict[str, Any]:
    """What a record says of the error of a matrix."""
    plain, square = moments.plain, moments.squares.get(name)
    losses: dict[str, Any] = {"proxy_loss": proxy_loss(W, W_hat, moments.H)}
    if plain is not None:
        losses["plain_loss"] = proxy_loss(W, W_hat, plain)
    if square is not None:
        error = energy(W_hat.double() - W.double(), moments.H)
        losses["damage"] = float(square) * error / (2 * len(W))
    return losses


def _record(
    name: str,
    block: int,
    W: Tensor,
    losses: Mapping[str, Any],
    damp: float,
    bits: float,
    seconds: float,
) -> MatrixRecord:
    m, n = W.shape
    return MatrixRecord(
        name=name,
        block=block,
        rows=m,
        columns=n,
        **losses,
        damp=damp,
        bits_per_weight=bits,
        seconds=seconds,
    )
