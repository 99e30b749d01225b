"""Cells that quantize a model: a run, its checkpoint, and what is tuned or timed of that."""

from collections.abc import Sequence
from pathlib import Path

from quip.jobs.agreement import PROMPT
from quip.jobs.evaluate import Evaluation, run_evaluation
from quip.jobs.experiment import Experiment
from quip.jobs.finetune import FineTuning, finetune_checkpoint
from quip.jobs.inspect import inspect_checkpoint
from quip.jobs.report.folder import read_report
from quip.jobs.requests import request
from quip.jobs.run import run_experiment
from quip.research.tables.cells import Cell
from quip.research.tables.description import recipe_of
from quip.research.tables.tuning import block_tuning, model_tuning, recipe_flags, run_options

WORK = "work"  # in the folder of a cell, what is not kept
PROMPTS = 64  # of each text, whose greedy texts are compared with the original's, at most


def run_quantization(cell: Cell, cells: Sequence[Cell]) -> None:
    """Quantize and evaluate, as `quip run` does; save what another of the cells starts from.

    Finished blocks are kept while it goes on.
    """
    _quantize(
        cell,
        save=any(other.checkpoint == cell.checkpoint for other in cells if other.kind != "run"),
    )


def checkpoint_of(cell: Cell) -> Path:
    """The checkpoint that the cell starts from, made and evaluated where it is not yet."""
    source = cell.source
    if not source.checkpoint.exists() or source.missing():
        _quantize(source, save=True)
    return source.checkpoint


def run_tuning(cell: Cell, cells: Sequence[Cell]) -> None:
    """Tune a checkpoint as `quip finetune` does, and evaluate what came of it.

    Where tuning improved nothing on the windows held out, the checkpoint is what it was.
    """
    s, asked = cell.settings, model_tuning(cell.flags)
    assert asked is not None, "a cell is tuned that names no tuning"
    tuning, windows = asked
    before, after = checkpoint_of(cell), cell.folder / WORK / "tuned"
    found = finetune_checkpoint(
        FineTuning(
            checkpoint=before,
            dataset=s.dataset,
            save=after,
            tuning=tuning,
            teacher=cell.model,
            nsamples=windows or s.nsamples,
            seqlen=s.seqlen,
            seed=s.seed,
            device=s.device,
            overwrite=True,
        )
    )
    tuned = after if found.improved else before
    report = run_evaluation(
        Evaluation(
            model=str(tuned),
            datasets=s.evaluate,
            nsamples=s.eval_nsamples,
            seqlen=s.seqlen,
            tasks=s.zero_shot(),
            batch_size=s.batch_size,
            device=s.device,
        )
    )
    run = read_report(before)
    cell.write(
        {
            **{key: run[key] for key in ("fingerprint", "calibration")},
            **{key: report[key] for key in ("device", "dtype", "evaluation", "perplexity")},
            "tasks": report.get("tasks"),
            "totals": {"bits_per_weight": inspect_checkpoint(tuned)["bits_per_weight"]},
            "held_out_kl": {"before": found.kl_before, "after": found.kl_after},
            "epochs": found.epochs,
            "seconds": {**report["seconds"], "tune": found.seconds},
        }
    )
    cell.keep()
    _compare(cell, tuned)


def run_speed(cell: Cell, cells: Sequence[Cell]) -> None:
    """Time the checkpoint, or the model as it is where the cell quantizes nothing."""
    s = cell.settings
    run_evaluation(
        Evaluation(
            model=str(checkpoint_of(cell)) if recipe_of(recipe_flags(cell.flags)) else cell.model,
            speed=True,
            device=s.device,
            dtype=s.dtype,
            out=cell.folder,
            overwrite=True,
        )
    )


def _quantize(cell: Cell, *, save: bool) -> None:
    s = cell.settings
    run_experiment(
        request(
            Experiment,
            s,
            model=cell.model,
            recipe=recipe_of(recipe_flags(cell.flags)),
            tuning=block_tuning(cell.flags),
            **run_options(cell.flags),
            method=" ".join(f"{k}={v}" for k, v in cell.flags.items()),
            eval_datasets=s.evaluate,
            tasks=s.zero_shot(),
            save=cell.checkpoint if save or cell.compares else None,
            out=cell.folder,
            resume=True,
            overwrite=True,
            flags=cell.flags,
        )
    )
    cell.keep()
    _compare(cell, cell.checkpoint)


def _compare(cell: Cell, checkpoint: Path) -> None:
    """Add how far its predictions moved and how long it writes the same, where that is asked."""
    if not cell.compares:
        return
    s = cell.settings
    texts = read_report(cell.folder)["evaluation"].values()
    prompts = min(text["windows"] * max(1, text["seqlen"] // PROMPT) for text in texts)
    found = run_evaluation(
        Evaluation(
            model=str(checkpoint),
            reference=cell.model,
            stream="off",  # greedy texts need both models whole
            perplexity=False,
            agreement=min(PROMPTS, prompts),
            datasets=s.evaluate,
            nsamples=s.eval_nsamples,
            seqlen=s.seqlen,
            device=s.device,
        )
    )
    cell.keep(found)
