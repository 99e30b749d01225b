"""quantize_model: walk the blocks, quantize each matrix, and write down what it cost."""

import logging
import time
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from quip.hessian import Hessian
from quip.linalg import proxy_loss
from quip.linear import QuantizedLinear
from quip.quantize import QuantizedMatrix, quantize_matrices
from quip.recipe import Recipe
from quip.records import MatrixRecord, Stopwatch
from quip.resume import Ledger
from quip.walk import Block, coverage, find_blocks, walk

log = logging.getLogger(__name__)


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
    ledger: Ledger | None = None,
) -> Iterator[MatrixRecord]:
    """`quantize_model`, which yields each record as soon as its matrix is in place.

    With a ledger, finished blocks are written down; those that it holds already are taken
    from it instead of being quantized again, and come out bitwise the same.
    Stages counted in `watch`: replay, observe, quantize, keep.
    """
    total, count = len(coverage(model).quantized), len(find_blocks(model)[1])
    # disable=None: a bar on a terminal only.
    with tqdm(total=total, unit="matrix", dynamic_ncols=True, disable=None) as bar:
        start, hidden = _take_up(ledger, count)
        for index in range(start):
            assert ledger is not None
            yield from _restore(ledger, index, model, bar)
        blocks = walk(
            model, tokens, device=device, batch_size=batch_size, start=start, hidden=hidden
        )
        for block in watch.each("replay", blocks if start < count else ()):
            bar.set_description(block.name)
            if ledger and block.index > start:
                with watch("keep"):
                    ledger.keep_hidden(block.index, block.hidden)
            if ledger and ledger.has(block.index):
                yield from _restore(ledger, block.index, model, bar)
            else:
                yield from _quantize_and_keep(block, recipe, seed, watch, ledger, bar)
    if ledger:
        ledger.forget_hidden()


def _take_up(ledger: Ledger | None, count: int) -> tuple[int, Tensor | None]:
    """The first of `count` blocks to walk, and the hidden states that enter it."""
    if ledger is None:
        return 0, None
    if all(map(ledger.has, range(count))):
        return count, None
    return ledger.hidden()


def _restore(ledger: Ledger, index: int, model: nn.Module, bar: tqdm) -> Iterator[MatrixRecord]:
    records = ledger.restore(index, model)
    log.info("block %d: %d matrices taken from the run before", index, len(records))
    bar.update(len(records))
    yield from records


def _quantize_and_keep(
    block: Block,
    recipe: Recipe,
    seed: int,
    watch: Stopwatch,
    ledger: Ledger | None,
    bar: tqdm,
) -> Iterator[MatrixRecord]:
    with watch("observe"):
        hessians = block.observe()
    records = []
    for record in watch.each("quantize", _quantize_block(block, hessians, recipe, seed)):
        _report(record, recipe, bar)
        records.append(record)
        yield record
    if ledger:
        with watch("keep"):
            ledger.keep(block, records)


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
