"""quantize_model: walk the blocks, quantize each matrix, and write down what it cost."""

from collections.abc import Iterator, Mapping
from itertools import chain, zip_longest
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from quip.data.hessians import HessianStore, StoredInput
from quip.errors import UsageError
from quip.matrix.hessian import Observed, sharing
from quip.matrix.recipe import Recipe
from quip.model.aim import Shrink, aim_of, turns
from quip.model.block import Block
from quip.model.block_module import BlockModule
from quip.model.deal import Deal, Group, rounds
from quip.model.experts import same_experts, tell_of_few
from quip.model.matrices import find_blocks, places
from quip.model.moments import Moments
from quip.model.plan import Plan
from quip.model.progress import Progress
from quip.model.promised import check_all
from quip.model.records import MatrixRecord
from quip.model.run import Run, Shrinking
from quip.model.sensitivity.found import Sensitivity
from quip.model.sensitivity.gather import share
from quip.model.sides import Side
from quip.model.tune.blocks import BlockTuner, BlockTuning
from quip.model.tune.tunable import learns
from quip.model.walk import blocks_at_rest, walk
from quip.model.work import REPORT, Work, bar_of, recipes_of, report_and_keep, restore
from quip.packed.experts import unfuse


def quantize_model(
    model: nn.Module,
    tokens: Int[Tensor, "count seqlen"],
    recipe: Recipe | Plan,
    *,
    device: torch.device | str,
    seed: int,
    batch_size: int = 1,
    tuning: BlockTuning | None = None,
    target_shrink: Shrinking = None,
    felt: Sensitivity | None = None,
) -> list[MatrixRecord]:
    """Quantize every matrix of the model's blocks in place, by the recipe or as the plan says.

    First block to last: each block sees the calibration tokens as the quantized blocks before it
    pass them on; the second moments of a block come from one pass before any of its own matrices is
    touched. With `tuning`, blocks are tuned on the way, and with `target_shrink` matrices make up
    for errors of their inputs, as `Run` says. Tokens weigh what was `felt` (`measure_sensitivity`).
    Raises UsageError, before anything runs, where a recipe cannot do a matrix or the plan does not
    fit the model's names.
    """
    unfuse(model)
    run = Run(
        recipe=recipe,
        seed=seed,
        device=device,
        batch_size=batch_size,
        tuning=tuning,
        target_shrink=target_shrink,
        felt=felt,
        weighs=felt is not None,
    )
    return list(quantize_matrix_by_matrix(model, tokens, run))


def quantize_matrix_by_matrix(
    model: nn.Module, tokens: Int[Tensor, "count seqlen"], run: Run
) -> Iterator[MatrixRecord]:
    """`quantize_model`, which yields each record as soon as its matrix is in place.

    Stages counted in `watch`: replay, observe, quantize, tune, keep.
    """
    recipes, count = recipes_of(model, run), len(find_blocks(model)[1])
    tuning, batch_size, team = run.tuning, run.batch_size, run.team
    if tuning:  # whose steps and held-out windows are made of the walk's batches
        batch_size = min(batch_size, tuning.batch_size, tuning.held(len(tokens)))
    team.check(len(tokens), batch_size)
    shrink = Shrink.of(run.target_shrink, len(tokens), batch_size, team)
    progress = Progress.of(run.ledger, team, batch_size)
    with bar_of(recipes) as bar:
        felt = share(run.felt, team, batch_size)
        work = Work(run, recipes, bar, progress, felt, shrink)
        start, hidden = progress.take_up(model, count, paired=shrink is not None)
        for index in range(start):
            yield from restore(index, model, work)
        blocks = walk(
            *(model, team.share(tokens, batch_size)),
            device=run.device,
            batch_size=batch_size,
            start=start,
            hidden=hidden,
            team=team,
            stream=run.stream,
            activations=run.activations,
            paired=shrink is not None,
        )
        for block in run.watch.each("replay", blocks if start < count else ()):
            bar.set_description(block.name)
            if progress.keeps and block.index > start:
                with run.watch("keep"):
                    progress.keep_hidden(block.index, block.streams)
            if progress.has(block.index):
                yield from restore(block.index, model, work)
            else:
                yield from report_and_keep(block, _quantize_block(block, work), work)
    check_all(model, work.done, work.recipes, REPORT)
    progress.forget_hidden()


def quantize_from_store(model: nn.Module, store: HessianStore, run: Run) -> Iterator[MatrixRecord]:
    """Quantize every matrix of the model's blocks in place, by second moments from a store.

    Nothing passes through the model: blocks do not depend on each other, and each input is read
    once. One H is in memory at a time. Stages counted in `watch`: read, quantize, keep. Raises
    UsageError for tuning, which needs activations.
    """
    if run.tuning:
        raise UsageError("tuning needs activations, of which a store has only the second moments")
    store.check(places(model))
    recipes, progress = recipes_of(model, run), Progress.of(run.ledger, run.team)
    with bar_of(recipes) as bar:
        work = Work(run, recipes, bar, progress)
        progress.serve(model)
        for block in blocks_at_rest(model, device=run.device, stream=run.stream):
            bar.set_description(block.name)
            if progress.has(block.index):
                yield from restore(block.index, model, work)
                continue
            inputs = [one for one in store.inputs if one.block == block.index]
            yield from report_and_keep(block, _quantize_by(store, inputs, block, work), work)
    check_all(model, work.done, work.recipes, REPORT)


def _quantize_by(
    store: HessianStore, inputs: list[StoredInput], block: BlockModule, work: Work
) -> Iterator[MatrixRecord]:
    run, device = work.run, next(block.module.parameters()).device

    def read(names: Group) -> Moments:
        with run.watch("read"):
            found = store.read(names[0])
            H = found.H.to(device, torch.float32)  # which holds it exactly
            felt, weighs = run.felt, run.felt is not None and run.weighs
            return Moments(
                H=H,
                count=found.count,
                squares=felt.squares(names) if felt and weighs else {},
                outputs=felt.outputs(names) if felt else {},
            )

    deal = Deal.of(block, [one.matrices for one in inputs], work.recipes, run.team)
    yield from run.watch.each("quantize", deal.quantize(read, work.recipes, run.seed))


def _quantize_block(block: Block, work: Work) -> Iterator[MatrixRecord]:
    run, watch, tuner = work.run, work.run.watch, None
    weights = [work.felt, None] if run.weighs else [None]
    sides: dict[str, Side] = {}
    if run.sides:
        with watch("sensitivity"):
            sides = run.sides.of(block)
    seen = turns(block, work.shrink, weights, all_experts=run.all_experts)
    for hessians, *plain in watch.each("observe", seen):
        tell_of_few(block.name, hessians)
        if run.tuning and not tuner:
            share = work.shrink.share if work.shrink else 1.0
            with watch("tune"):
                tuner = BlockTuner(block, run.tuning, seed=run.seed, share=share, team=run.team)
        run.observed(block.index, hessians)
        yield from _quantize_observed(block, hessians, plain, sides, tuner, work)


def _has_more(block: Block, work: Work) -> bool:
    """Whether a matrix of the block is still to be quantized."""
    return any(name in work.recipes for name in block.matrices())


def _quantize_observed(
    block: Block,
    hessians: dict[str, Observed],
    plain: list[dict[str, Observed]],
    sides: Mapping[str, Side],
    tuner: BlockTuner | None,
    work: Work,
) -> Iterator[MatrixRecord]:
    run, team, watch = work.run, work.run.team, work.run.watch
    dealt = list(rounds(sharing(hessians), hessians, team, one_by_one=tuner is not None))
    for together, after in zip_longest(dealt, dealt[1:]):
        deal = Deal.of(block, together, work.recipes, team)
        with watch("observe"):
            sums, *alike = [deal.totals(each) for each in (hessians, *plain)]

        def moments(names: Group, sums: Any = sums, alike: Any = alike) -> Moments:
            count, own = hessians[names[0]].count, alike[0] if alike else None
            aim, side = aim_of(sums[names[0]], work.shrink), sides.get(names[0])
            return Moments.of(names, count, sums, own, work.felt, aim=aim, side=side)

        found = deal.quantize(moments, work.recipes, run.seed)
        yield from watch.each("quantize", found)
        # Experts are tuned when all are done. After the last group no matrix is left to tune: only
        # what was learnt of those before.
        waits = after and same_experts(hessians[together[-1][0]], hessians[after[0][0]])
        for name in chain.from_iterable(together):
            for each in (hessians, *plain):
                del each[name]  # which take more memory than the block
        if tuner and not waits and (_has_more(block, work) or learns(block.module)):
            with watch("tune"):
                run.tuned.append(tuner.tune(together[-1]))
            work.bar.set_postfix_str(f"tuned, loss {run.tuned[-1].loss_after:.2e}")
