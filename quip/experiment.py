"""One run from names to numbers: load, calibrate, quantize, save, evaluate, report on the way."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quip.checkpoint import check_replaced
from quip.data import TokenSet, calibration_tokens, check_dataset
from quip.device import choose_device, device_name
from quip.errors import QuipError, UnsupportedModel, UsageError
from quip.evaluate.zeroshot import ZeroShot
from quip.evaluation import (
    check_measures,
    default_seqlen,
    measure_perplexities,
    measure_tasks,
    token_sets,
)
from quip.files import check_new
from quip.finetune import BlockTuning, TuningRecord
from quip.linear import quantized_layers
from quip.models import LoadedModel, load_model
from quip.notes import save_with_notes, write_notes
from quip.pipeline import quantize_matrix_by_matrix
from quip.recipe import Recipe, describe
from quip.records import MatrixRecord, Stopwatch, versions
from quip.report import Report
from quip.resume import Ledger, fingerprint_of
from quip.run_folder import RunFolder, read_report
from quip.walk import check_weights, coverage

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096  # enough for full matrix products, little enough for any memory


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that one run depends on."""

    model: str
    dataset: str
    recipe: Recipe | None  # None evaluates the model as it is
    tuning: BlockTuning | None = None  # of each block, while it is quantized
    load: str | None = None  # a checkpoint of the model, evaluated in its place
    method: str = "unquantized"  # the recipe in a person's words
    nsamples: int = 128
    seqlen: int | None = None  # None: the model's positions, at most 2048
    seed: int = 0
    device: str | None = None  # None: cuda if there is one
    dtype: str = "auto"
    eval_datasets: tuple[str, ...] = ()
    eval_nsamples: int | None = None
    tasks: ZeroShot | None = None
    batch_size: int = 8  # of tasks
    compare: bool = False
    save: Path | None = None  # the checkpoint
    out: Path | None = None  # the report and, for `resume`, the finished blocks
    resume: bool = False
    overwrite: bool = False
    flags: Mapping[str, object] = field(default_factory=dict)  # as given, for the report


def run_experiment(experiment: Experiment) -> dict[str, Any]:
    """Run it and return the report, which `out` receives before and after each long stage.

    What is asked for is checked first, as far as it can be known without the model. A run that
    fails leaves a report of what it had reached, and of the reason.
    """
    save = experiment.save and experiment.save.resolve()  # also if it is the folder we are in
    e, watch = replace(experiment, save=save), Stopwatch()
    folder, device = _check(e)
    with watch("load"):
        loaded = load_model(e.load or e.model, dtype=e.dtype, seqlen=e.seqlen)
        kept = _matrices_kept(loaded) if e.recipe else ()
        check_weights(loaded.model)
    with watch("data"):
        calibration = _calibration(e, loaded) if e.recipe else None
        windows = token_sets(e.eval_datasets, loaded, seqlen=e.seqlen, nsamples=e.eval_nsamples)
    ledger = _ledger(e, loaded, calibration, device, folder)
    earlier = folder.earlier_report() if folder else {}
    entries = _entries(e, loaded, device) | {
        "calibration": calibration and calibration.stamp,
        "evaluation": {name: tokens.stamp for name, tokens in windows.items()},
        "kept_matrices": list(kept),
        "fingerprint": ledger and ledger.fingerprint,
        "seconds": watch.seconds,
    }
    report = Report(entries, folder=folder, device=device)
    report.save("started")
    with report.kept():
        if e.compare and (e.recipe or e.load):
            original = load_model(e.model, dtype=loaded.dtype_name) if e.load else loaded
            measure_perplexities(
                "original_perplexity", windows, original, report, watch, earlier=earlier
            )
            del original
        if e.recipe and calibration:
            records = _quantize(e, e.recipe, calibration, loaded, report, watch, ledger)
            if e.save:
                with watch("save"):
                    save_with_notes(
                        e.save, loaded, records, report, overwrite=e.overwrite, resume=e.resume
                    )
        measure_perplexities("perplexity", windows, loaded, report, watch, earlier=earlier)
        if e.tasks:
            measure_tasks(e.tasks, loaded, report, watch, batch_size=e.batch_size, earlier=earlier)
        report.save("complete")
        if e.save:
            write_notes(e.save, report)
    return report.entries


def _check(e: Experiment) -> tuple[RunFolder | None, str]:
    """Whatever can be refused at once; the run's folder, not made yet, and its device."""
    folder = RunFolder(e.out, overwrite=e.overwrite, resume=e.resume) if e.out else None
    if e.save:
        if e.out and e.out.resolve().is_relative_to(e.save.resolve()):
            raise UsageError(
                f"--out {e.out} is in --save {e.save}, which is written as a whole; "
                "name two folders"
            )
        _check_save(e)
    device = choose_device(e.device)
    check_dataset(e.dataset, "calibration")
    check_measures(e.eval_datasets, e.tasks)
    return folder, device


def _matrices_kept(loaded: LoadedModel) -> tuple[str, ...]:
    """The matrices that stay as they are, in a model whose others can all be quantized."""
    if quantized_layers(loaded.model):
        raise UnsupportedModel(
            f"{loaded.name} is a checkpoint of quip, quantized already; give the original, or "
            "leave out --wbits to evaluate it"
        )
    covered = coverage(loaded.model)
    if not covered.quantized:
        raise UnsupportedModel(
            f"{loaded.name}: its blocks hold no nn.Linear to quantize; give another model"
        )
    return covered.kept


def _calibration(e: Experiment, loaded: LoadedModel) -> TokenSet:
    seqlen = e.seqlen or default_seqlen(loaded)
    return calibration_tokens(
        e.dataset, loaded.tokenizer, nsamples=e.nsamples, seqlen=seqlen, seed=e.seed
    )


def _ledger(
    e: Experiment,
    loaded: LoadedModel,
    calibration: TokenSet | None,
    device: str,
    folder: RunFolder | None,
) -> Ledger | None:
    """Where finished blocks go, in the run's folder, with a fingerprint of all they depend on."""
    if folder is None or e.recipe is None or calibration is None:
        return None
    fingerprint = fingerprint_of(
        loaded, calibration, e.recipe, e.tuning, seed=e.seed, device=torch.device(device)
    )
    ledger = Ledger(folder.path / RunFolder.BLOCKS, fingerprint)
    folder.open()
    try:
        ledger.open()
        _check_save(e, ledger.fingerprint)
    except QuipError:
        folder.release()
        raise
    return ledger


def _check_save(e: Experiment, fingerprint: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder that holds files, unless a run that is taken up has saved there already.

    With --overwrite it is replaced whole, so it has to be a checkpoint, and not hold our inputs.
    """
    if e.save is None:
        return
    saved = read_report(e.save).get("fingerprint") if e.resume else None
    same = saved is not None and fingerprint in (None, saved)
    check_new(e.save, "--save", overwrite=e.overwrite or same)
    if e.overwrite and e.save.is_dir() and any(e.save.iterdir()):
        check_replaced(e.save)
        for name in (e.model, e.dataset, *e.eval_datasets):
            if Path(name).expanduser().resolve().is_relative_to(e.save):
                raise UsageError(f"--save {e.save}: {name} is in it, and would be lost")


def _entries(e: Experiment, loaded: LoadedModel, device: str) -> dict[str, Any]:
    """What the report says of the request and the machine."""
    return {
        "model": e.model,
        "dataset": e.dataset,
        "method": e.method,
        "flags": dict(e.flags),
        "recipe": e.recipe and describe(e.recipe),
        "tuning": e.tuning and asdict(e.tuning),
        "seed": e.seed,
        "device": device_name(device),
        "dtype": loaded.dtype_name,
        "versions": versions(),
    }


def _quantize(
    e: Experiment,
    recipe: Recipe,
    calibration: TokenSet,
    loaded: LoadedModel,
    report: Report,
    watch: Stopwatch,
    ledger: Ledger | None,
) -> list[MatrixRecord]:
    records: list[MatrixRecord] = []
    tuned: list[TuningRecord] = []
    try:
        for record in quantize_matrix_by_matrix(
            loaded.model,
            calibration.ids,
            recipe,
            device=report.device,
            seed=e.seed,
            watch=watch,
            batch_size=max(1, TOKENS_PER_BATCH // calibration.seqlen),
            ledger=ledger,
            tuning=e.tuning,
            tuned=tuned,
        ):
            records.append(record)
    finally:
        if records:
            if e.tuning:
                report.entries["tuned"] = [asdict(record) for record in tuned]
            report.save_matrices("quantized", records)
    return records
