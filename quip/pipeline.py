"""quantize_model: walk the blocks, quantize each matrix, and write down what it cost."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from quip.finetune.blocks import BlockTuner, BlockTuning, TuningRecord
from quip.hessian import Hessian
from quip.linalg import proxy_loss
from quip.linear import QuantizedLinear
from quip.quantize import quantize_matrices, quantize_matrix, rng_for
from quip.recipe import Recipe
from quip.records import MatrixRecord, Stopwatch
from quip.resume import Ledger
from quip.stack import Stack, StackedLinear, in_order, stacked
from quip.walk import Block, coverage, find_blocks, walk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """What all blocks of a run have in common."""

    recipe: Recipe
    seed: int
    watch: Stopwatch
    bar: tqdm
    ledger: Ledger | None
    tuning: BlockTuning | None
    tuned: list[TuningRecord]


def quantize_model(
    model: nn.Module,
    tokens: Int[Tensor, "count seqlen"],
    recipe: Recipe,
    *,
    device: torch.device | str,
    seed: int,
    batch_size: int = 1,
    tuning: BlockTuning | None = None,
) -> list[MatrixRecord]:
    """Quantize every matrix of the model's blocks in place, first block to last.

    Each block sees the calibration tokens as the quantized blocks before it pass them on; the
    second moments of a block come from one pass before any of its own matrices is touched. With
    `tuning`, what is left of a block is tuned after each group of matrices but the last.
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
            tuning=tuning,
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
    tuning: BlockTuning | None = None,
    tuned: list[TuningRecord] | None = None,
) -> Iterator[MatrixRecord]:
    """`quantize_model`, which yields each record as soon as its matrix is in place.

    With a ledger, finished blocks are written down; those that it holds already are taken
    from it instead of being quantized again, and come out bitwise the same. What tuning comes to
    is added to `tuned`.
    Stages counted in `watch`: replay, observe, quantize, tune, keep.
    """
    matrices, count = coverage(model).quantized, len(find_blocks(model)[1])
    for name in matrices:
        m, n = model.get_parameter(f"{name}.weight").shape
        recipe.check(m, n, name)
    if tuning:  # whose steps and held-out windows are made of the walk's batches
        batch_size = min(batch_size, tuning.batch_size, tuning.held(len(tokens)))
    # disable=None: a bar on a terminal only.
    with tqdm(total=len(matrices), unit="matrix", dynamic_ncols=True, disable=None) as bar:
        run = _Run(recipe, seed, watch, bar, ledger, tuning, [] if tuned is None else tuned)
        start, hidden = _take_up(ledger, count)
        for index in range(start):
            yield from _restore(run, index, model)
        blocks = walk(
            model, tokens, device=device, batch_size=batch_size, start=start, hidden=hidden
        )
        for block in watch.each("replay", blocks if start < count else ()):
            bar.set_description(block.name)
            if ledger and block.index > start:
                with watch("keep"):
                    ledger.keep_hidden(block.index, block.hidden)
            if ledger and ledger.has(block.index):
                yield from _restore(run, block.index, model)
            else:
                yield from _quantize_and_keep(block, run)
    if ledger:
        ledger.forget_hidden()


def _take_up(ledger: Ledger | None, count: int) -> tuple[int, Tensor | None]:
    """The first of `count` blocks to walk, and the hidden states that enter it."""
    if ledger is None:
        return 0, None
    if all(map(ledger.has, range(count))):
        return count, None
    return ledger.hidden()


def _restore(run: _Run, index: int, model: nn.Module) -> Iterator[MatrixRecord]:
    assert run.ledger is not None
    records, tuned = run.ledger.restore(index, model)
    log.info("block %d: %d matrices taken from the run before", index, len(records))
    run.bar.update(len(records))
    run.tuned.extend(tuned)
    yield from records


def _quantize_and_keep(block: Block, run: _Run) -> Iterator[MatrixRecord]:
    records, known = [], len(run.tuned)
    for record in _quantize_block(block, run):
        _report(record, run.recipe, run.bar)
        records.append(record)
        yield record
    if run.ledger:
        with run.watch("keep"):
            run.ledger.keep(block, records, run.tuned[known:])


def _quantize_block(block: Block, run: _Run) -> Iterator[MatrixRecord]:
    watch, tuner = run.watch, None
    if run.tuning:
        with watch("tune"):
            tuner = BlockTuner(block, run.tuning, seed=run.seed)
    with watch("observe"):
        hessians = block.observe()
    groups = _sharing(hessians)
    for names in groups:
        H = hessians[names[0]].value()
        found = _quantize_group(block, names, H, run.recipe, run.seed)
        yield from watch.each("quantize", found)
        if tuner and names is not groups[-1]:  # after which no matrix is left to tune
            with watch("tune"):
                run.tuned.append(tuner.tune(names))
            run.bar.set_postfix_str(f"tuned, loss {run.tuned[-1].loss_after:.2e}")


def _quantize_group(
    block: Block, names: Sequence[str], H: Tensor, recipe: Recipe, seed: int
) -> Iterator[MatrixRecord]:
    linears = block.linears()
    members = {name: linears[name] for name in names}
    rows = sum(linear.out_features for linear in members.values())
    if recipe.stack and len(names) > 1 and recipe.can_do(rows, len(H)):
        yield from _quantize_stack(block, members, H, recipe, seed)
    else:
        yield from _quantize_each(block, members, H, recipe, seed)


def _quantize_each(
    block: Block, linears: Mapping[str, nn.Linear], H: Tensor, recipe: Recipe, seed: int
) -> Iterator[MatrixRecord]:
    weights = {name: linear.weight.detach() for name, linear in linears.items()}
    start = time.perf_counter()
    for name, quantized in quantize_matrices(weights, H, recipe, seed=seed):
        block.replace(name, QuantizedLinear.from_matrix(quantized, linears[name].bias))
        W, bits = weights[name], quantized.bits_per_weight
        loss = proxy_loss(W, quantized.dequantize(), H)
        seconds = time.perf_counter() - start
        yield _record(name, block.index, W, loss, quantized.damp, bits, seconds)
        start = time.perf_counter()


def _quantize_stack(
    block: Block, linears: Mapping[str, nn.Linear], H: Tensor, recipe: Recipe, seed: int
) -> Iterator[MatrixRecord]:
    start, linears = time.perf_counter(), {name: linears[name] for name in in_order([*linears])}
    weights = {name: linear.weight.detach() for name, linear in linears.items()}
    W, scales = stacked(weights)
    key = " ".join(linears)
    quantized = quantize_matrix(W, H, recipe, rng=rng_for(seed, key), name=key)
    stack = Stack.of(quantized, scales, [len(W) for W in weights.values()])
    for index, (name, linear) in enumerate(linears.items()):
        member = StackedLinear(stack, index, linear.bias is not None, device="meta")
        member.bias = linear.bias
        block.replace(name, member)
    parts = stack.dequantize().split(list(stack.sizes))
    seconds = (time.perf_counter() - start) / len(linears)
    for (name, W), W_hat in zip(weights.items(), parts, strict=True):
        loss, bits = proxy_loss(W, W_hat, H), stack.bits_per_weight
        yield _record(name, block.index, W, loss, quantized.damp, bits, seconds)


def _sharing(hessians: Mapping[str, Hessian]) -> list[list[str]]:
    """The names of the matrices, those with one Hessian together."""
    groups: dict[int, list[str]] = {}
    for name, hessian in hessians.items():
        groups.setdefault(id(hessian), []).append(name)
    return list(groups.values())


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
