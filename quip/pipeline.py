"""quantize_model: walk the blocks, quantize each matrix, and write down what it cost."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from quip.hessian import Hessian
from quip.linalg import proxy_loss
from quip.linear import QuantizedLinear
from quip.quantize import QuantizedMatrix, quantize_matrices
from quip.recipe import Recipe
from quip.walk import Block, coverage, walk

log = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class MatrixRecord:
    """What quantizing one matrix came to."""

    name: str
    block: int
    rows: int
    columns: int
    proxy_loss: float  # relative, original basis, undamped H
    damp: float  # as used
    bits_per_weight: float  # all overheads included
    seconds: float


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def each(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with the time taken to come by them counted as `stage`."""
        iterator, done = iter(items), object()
        while True:
            with self(stage):
                item = next(iterator, done)
            if item is done:
                return
            yield item  # type: ignore[misc]


def quantize_model(
    model: nn.Module,
    tokens: Int[Tensor, "count seqlen"],
    recipe: Recipe,
    *,
    device: torch.device | str,
    seed: int,
    batch_size: int = 1,
) -> list[MatrixRecord]:
    """Quantize every matrix of the model's blocks in place, first block to last.

    Each block sees the calibration tokens as the quantized blocks before it pass them on; the
    second moments of a block come from one pass before any of its own matrices is touched.
    """
    return list(
        quantize_matrix_by_matrix(
            model,
            tokens,
            recipe,
            device=device,
            seed=seed,
            watch=Stopwatch(),
            batch_size=batch_size,
        )
    )


def quantize_matrix_by_matrix(
    model: nn.Module,
    tokens: Int[Tensor, "count seqlen"],
    recipe: Recipe,
    *,
    device: torch.device | str,
    seed: int,
    watch: Stopwatch,
    batch_size: int = 1,
) -> Iterator[MatrixRecord]:
    """`quantize_model`, which yields each record as soon as its matrix is in place.

    Stages counted in `watch`: replay, observe, quantize.
    """
    total = len(coverage(model).quantized)
    # disable=None: a bar on a terminal only.
    with tqdm(total=total, unit="matrix", dynamic_ncols=True, disable=None) as bar:
        blocks = walk(model, tokens, device=device, batch_size=batch_size)
        for block in watch.each("replay", blocks):
            bar.set_description(block.name)
            with watch("observe"):
                hessians = block.observe()
            for record in watch.each("quantize", _quantize_block(block, hessians, recipe, seed)):
                _report(record, recipe, bar)
                yield record


def _quantize_block(
    block: Block, hessians: Mapping[str, Hessian], recipe: Recipe, seed: int
) -> Iterator[MatrixRecord]:
    linears = block.linears()
    for names in _sharing(hessians):
        H = hessians[names[0]].value()
        weights = {name: linears[name].weight.detach() for name in names}
        start = time.perf_counter()
        for name, quantized in quantize_matrices(weights, H, recipe, seed=seed):
            block.replace(name, QuantizedLinear.from_matrix(quantized, linears[name].bias))
            record = _record(name, block.index, weights[name], H, quantized, start)
            start = time.perf_counter()
            yield record


def _sharing(hessians: Mapping[str, Hessian]) -> list[list[str]]:
    """The names of the matrices, those with one Hessian together."""
    groups: dict[int, list[str]] = {}
    for name, hessian in hessians.items():
        groups.setdefault(id(hessian), []).append(name)
    return list(groups.values())


def _record(
    name: str,
    block: int,
    W: Float[Tensor, "m n"],
    H: Float[Tensor, "n n"],
    quantized: QuantizedMatrix,
    start: float,
) -> MatrixRecord:
    loss = proxy_loss(W, quantized.dequantize(), H)
    return MatrixRecord(
        name=name,
        block=block,
        rows=W.shape[0],
        columns=W.shape[1],
        proxy_loss=loss,
        damp=quantized.damp,
        bits_per_weight=quantized.bits_per_weight,
        seconds=time.perf_counter() - start,
    )


def _report(record: MatrixRecord, recipe: Recipe, bar: tqdm) -> None:
    if record.damp > recipe.damp:
        log.warning(
            "%s: not positive definite with damping %g; used %g",
            record.name,
            recipe.damp,
            record.damp,
        )
    log.info(
        "%s: %.3f bits, proxy loss %.3g, %.2f s",
        record.name,
        record.bits_per_weight,
        record.proxy_loss,
        record.seconds,
    )
    bar.set_postfix_str(f"{record.name.rpartition('.')[2]} loss {record.proxy_loss:.2e}")
    bar.update()
