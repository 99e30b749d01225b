"""Running the cells that are missing, one after the other; what fails is noted and passed over."""

import gc
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from quip.data import check_dataset
from quip.errors import QuipError, Unavailable
from quip.jobs.evaluate import Evaluation, check_measures, run_evaluation
from quip.jobs.report.folder import RunFolder
from quip.jobs.run import Experiment, run_experiment
from quip.model.load import read_config
from quip.research.tables.cells import Cell
from quip.research.tables.description import recipe_of
from quip.research.tables.stored import run_proxies, run_statistics

log = logging.getLogger(__name__)

WORK = "work"  # in the folder of a cell, what is not kept


def run_missing(cells: Sequence[Cell]) -> None:
    """Run each cell that lacks a number, as far as its model can be had.

    Raises UsageError before anything runs for data or tasks that are none, and Unavailable at the
    end, with what the first said, if cells failed: what is done is kept.
    """
    missing = [cell for cell in cells if cell.missing()]
    for cell in cells:
        if cell not in missing:
            _tidy(cell)  # a kill may have come before it was tidied
    for settings in {cell.settings for cell in missing}:
        check_dataset(settings.dataset, "calibration")
        check_measures(settings.evaluate, settings.zero_shot())
    failed: dict[str, str] = {}
    unreachable: dict[str, str] = {}
    for model in dict.fromkeys(cell.model for cell in missing):
        try:
            read_config(model)
        except QuipError as error:  # the others can be run all the same
            unreachable[model] = str(error)
    with tqdm(total=len(missing), unit="cell", dynamic_ncols=True, disable=None) as bar:
        for number, cell in enumerate(missing, start=1):
            name = f"{cell.folder.parent.name}/{cell.folder.name}"
            bar.set_description(name)
            log.info("cell %d of %d: %s", number, len(missing), name)
            reason = unreachable.get(cell.model) or _attempt(cell, missing)
            if reason:
                failed[name] = reason
                log.error("%s failed: %s", name, reason)
            bar.update()
    if failed:
        name, reason = next(iter(failed.items()))
        raise Unavailable(
            f"{len(failed)} of {len(missing)} cells failed, the first, {name}: {reason}; "
            "mend it and give the same command again, which runs only what is missing"
        )


def _attempt(cell: Cell, cells: Sequence[Cell]) -> str | None:
    """Run a cell, unless it came with one before; what went wrong, if something did."""
    try:
        if cell.missing():
            RUNNERS[cell.kind](cell, cells)
            _tidy(cell)
    except QuipError as error:
        return str(error)
    except torch.OutOfMemoryError as error:
        return f"{error}; choose a smaller model or another device"
    finally:
        gc.collect()  # a model is in cycles of its own, and the next one needs the room
    return None


def _run(cell: Cell, cells: Sequence[Cell]) -> None:
    """Quantize and evaluate, as `quip run` does; finished blocks are kept while it goes on."""
    run_experiment(_experiment(cell, cell.folder))
    cell.keep()


def _speed(cell: Cell, cells: Sequence[Cell]) -> None:
    """Quantize, save, and time the checkpoint; only the times are kept."""
    s, model = cell.settings, cell.model
    if recipe_of(cell.flags):
        work = cell.folder / WORK
        model = str(work / "checkpoint")
        run_experiment(_experiment(cell, work / "run", save=Path(model), evaluate=False))
    run_evaluation(
        Evaluation(
            model=model,
            speed=True,
            device=s.device,
            dtype=s.dtype,
            out=cell.folder,
            overwrite=True,
        )
    )


def _tidy(cell: Cell) -> None:
    """Remove what only an unfinished cell needs."""
    for name in (RunFolder.BLOCKS, WORK):
        shutil.rmtree(cell.folder / name, ignore_errors=True)


def _experiment(
    cell: Cell, out: Path, *, save: Path | None = None, evaluate: bool = True
) -> Experiment:
    s = cell.settings
    return Experiment(
        model=cell.model,
        dataset=s.dataset,
        recipe=recipe_of(cell.flags),
        method=" ".join(f"{k}={v}" for k, v in cell.flags.items()),
        nsamples=s.nsamples,
        seqlen=s.seqlen,
        seed=s.seed,
        device=s.device,
        dtype=s.dtype,
        eval_datasets=s.evaluate if evaluate else (),
        eval_nsamples=s.eval_nsamples,
        tasks=s.zero_shot() if evaluate else None,
        batch_size=s.batch_size,
        save=save,
        out=out,
        resume=True,
        overwrite=True,
        flags=cell.flags,
    )


# kind -> what runs a cell; the others that are missing may be done with it.
RUNNERS: Mapping[str, Callable[[Cell, Sequence[Cell]], None]] = {
    "run": _run,
    "speed": _speed,
    "proxy": run_proxies,
    "hessians": run_statistics,
}
