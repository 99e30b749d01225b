"""Running the cells that are missing, one after the other; what fails is noted and passed over."""

import gc
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm import tqdm

from quip.data import check_dataset
from quip.errors import QuipError, Unavailable
from quip.jobs.evaluate import check_measures
from quip.jobs.report.folder import RunFolder
from quip.model.load import read_config
from quip.research.tables.cells import Cell
from quip.research.tables.quantized import WORK, run_quantization, run_speed, run_tuning
from quip.research.tables.saved import run_saved
from quip.research.tables.stored import run_proxies, run_statistics

log = logging.getLogger(__name__)


def run_missing(cells: Sequence[Cell]) -> None:
    """Run each cell that lacks a number, as far as its model can be had.

    Raises UsageError before anything runs for data or tasks that are none, and Unavailable at the
    end, with what the first said, if cells failed: what is done is kept.
    """
    missing = [cell for cell in cells if cell.missing()]
    for cell in cells:
        if cell not in missing:
            _tidy(cell, missing)  # a kill may have come before it was tidied
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
            reason = unreachable.get(cell.model) or _attempt(cell, missing[number - 1 :])
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
    """Run a cell, the first of those to come, unless it came with one before.

    Returns what went wrong, if something did.
    """
    try:
        if cell.missing():
            RUNNERS[cell.kind](cell, cells)
        _tidy(cell, cells[1:])
    except QuipError as error:
        return str(error)
    except torch.OutOfMemoryError as error:
        return f"{error}; choose a smaller model or another device"
    finally:
        gc.collect()  # a model is in cycles of its own, and the next one needs the room
    return None


def _tidy(cell: Cell, cells: Sequence[Cell]) -> None:
    """Remove what only an unfinished cell needs, and a checkpoint that none to come starts from."""
    for folder in (cell.folder, cell.source.folder):
        for name in (RunFolder.BLOCKS, WORK):
            shutil.rmtree(folder / name, ignore_errors=True)
    if not any(other.checkpoint == cell.checkpoint for other in cells):
        shutil.rmtree(cell.checkpoint, ignore_errors=True)


# kind -> what runs a cell; the others that are missing may be done with it.
RUNNERS: Mapping[str, Callable[[Cell, Sequence[Cell]], None]] = {
    "run": run_quantization,
    "tuned": run_tuning,
    "saved": run_saved,
    "speed": run_speed,
    "proxy": run_proxies,
    "hessians": run_statistics,
}
