"""The matrices that one input feeds, quantized: one by one, or stacked."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from quip.matrix.linalg import proxy_loss
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
    for name, quantized in quantize_matrices(weights, H, recipe, seed=seed):
        block.replace(name, QuantizedLinear.from_matrix(quantized, biases[name]))
        W, bits = weights[name], quantized.bits_per_weight
        loss = proxy_loss(W, quantized.dequantize(), H)
        seconds = time.perf_counter() - start
        yield _record(name, block.index, W, loss, quantized.damp, bits, seconds)
        start = time.perf_counter()


def _quantize_stack(
    block: BlockModule, members: Sequence[Matrix], moments: Moments, recipe: Recipe, seed: int
) -> Iterator[MatrixRecord]:
    H = moments.H
    start, by_name = time.perf_counter(), {matrix.name: matrix for matrix in members}
    members = [by_name[name] for name in in_order([*by_name])]
    weights = {matrix.name: matrix.weight.detach() for matrix in members}
    W, scales = stacked(weights)
    key = " ".join(weights)
    quantized = quantize_matrix(W, H, recipe, rng=rng_for(seed, key), name=key)
    stack = Stack.of(quantized, scales, [len(W) for W in weights.values()])
    for index, matrix in enumerate(members):
        member = StackedLinear(stack, index, matrix.bias is not None, device="meta")
        member.bias = matrix.bias
        block.replace(matrix.name, member)
    parts = stack.dequantize().split(list(stack.sizes))
    seconds = (time.perf_counter() - start) / len(members)
    for (name, W), W_hat in zip(weights.items(), parts, strict=True):
        loss, bits = proxy_loss(W, W_hat, H), stack.bits_per_weight
        yield _record(name, block.index, W, loss, quantized.damp, bits, seconds)


def _record(
    name: str, block: int, W: Tensor, loss: float, damp: float, bits: float, seconds: float
) -> MatrixRecord:
    m, n = W.shape
    return MatrixRecord(
        name=name,
        block=block,
        rows=m,
        columns=n,
        proxy_loss=loss,
        damp=damp,
        bits_per_weight=bits,
        seconds=seconds,
    )
