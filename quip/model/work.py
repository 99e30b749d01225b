"""A run at work on a model: what is restored, told, kept and counted on the way."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn
from tqdm import tqdm

from quip.errors import finite
from quip.matrix.recipe import Recipe
from quip.model.aim import Shrink
from quip.model.block_module import BlockModule
from quip.model.device import enough_memory
from quip.model.matrices import covered, find_blocks
from quip.model.plan import Plan
from quip.model.progress import Progress
from quip.model.promised import check_block
from quip.model.records import MatrixRecord
from quip.model.run import Run
from quip.model.sensitivity.found import Sensitivity

log = logging.getLogger(__name__)
REPORT = "please report it, with the command"


@dataclass(frozen=True)
class Work:
    """A run on a model: the recipe of each matrix, and a bar of those that are done."""

    run: Run
    recipes: dict[str, Recipe]
    bar: tqdm
    progress: Progress
    felt: Sensitivity | None = None  # of the windows of this process
    shrink: Shrink | None = None
    done: list[str] = field(default_factory=list)


def recipes_of(model: nn.Module, run: Run) -> dict[str, Recipe]:
    """The recipe of each matrix to quantize, which it can do."""
    matrices = covered(model)
    recipes = Plan.of(run.recipe).recipes(matrix.name for matrix in matrices)
    for matrix in matrices:
        recipes[matrix.name].check(matrix.rows, matrix.columns, matrix.name)
    return recipes


def bar_of(recipes: Mapping[str, Recipe]) -> tqdm:
    """A bar of the matrices that are done, on a terminal only."""
    return tqdm(total=len(recipes), unit="matrix", dynamic_ncols=True, disable=None)


def restore(index: int, model: nn.Module, work: Work) -> Iterator[MatrixRecord]:
    """The records of a block that an earlier run finished, once its matrices are in place."""
    records, tuned = work.progress.restore(index, model)
    name, remedy = f"{find_blocks(model)[0]}.{index}", "start over with --overwrite"
    work.done.extend(check_block(name, records, work.recipes, remedy))
    log.info("block %d: %d matrices taken from the run before", index, len(records))
    work.bar.update(len(records))
    work.run.tuned.extend(tuned)
    yield from records


def report_and_keep(
    block: BlockModule, found: Iterator[MatrixRecord], work: Work
) -> Iterator[MatrixRecord]:
    """The records as they are found; at the end of the block, what was found is written down."""
    run = work.run
    records, known = [], len(run.tuned)
    with enough_memory(f"{block.name} on {run.device}", "free the device, or say --device cpu"):
        for record in found:
            _report(record, work.recipes[record.name].damp, work.bar)
            records.append(record)
            yield record
    work.done.extend(check_block(block.name, records, work.recipes, REPORT))
    if work.progress.ledger:  # also that of a process which alone streams, as memory is short
        with run.watch("keep"):
            work.progress.keep(block, records, run.tuned[known:])


def _report(record: MatrixRecord, damp: float, bar: tqdm) -> None:
    if record.damp > damp:
        told = record.name, damp, record.damp
        log.warning("%s: not positive definite with damping %g; used %g", *told)
    finite(record.proxy_loss, f"{record.name}: the proxy loss")
    log.info(
        "%s: %.3f bits, proxy loss %.3g, %.2f s",
        *(record.name, record.bits_per_weight, record.proxy_loss, record.seconds),
    )
    bar.set_postfix_str(f"{record.name.rpartition('.')[2]} loss {record.proxy_loss:.2e}")
    bar.update()
