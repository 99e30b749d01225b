"""One run from names to numbers: load, calibrate, quantize, save, evaluate, report on the way."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from quip.data import check_dataset
from quip.data.hessians import HessianStore
from quip.errors import QuipError, UsageError
from quip.jobs.alike import check_inputs, check_request
from quip.jobs.calibration import calibration_of, check_experts, check_weights_of, store_for
from quip.jobs.evaluate import check_measures, evaluation_entries, measure_perplexities, token_sets
from quip.jobs.experiment import Experiment, entries_of, settled
from quip.jobs.fingerprint import Source, fingerprint_of
from quip.jobs.report.folder import RunFolder
from quip.jobs.report.report import Report
from quip.jobs.report.saved import save_with_notes, write_notes
from quip.jobs.requests import NO_WEIGHTS
from quip.jobs.saving import check_save
from quip.jobs.sensitivity import forget_felt, with_felt
from quip.jobs.streaming import check_all_weights, ledger_for, no_longer_than_this
from quip.jobs.tasks import fetched, measure_tasks
from quip.matrix.recipe import Recipe
from quip.model.activations import Activations
from quip.model.device import choose_device
from quip.model.ledger import Ledger
from quip.model.load import LoadedModel, load_model
from quip.model.matrices import check_quantizable
from quip.model.plan import Plan
from quip.model.quantize import quantize_from_store, quantize_matrix_by_matrix
from quip.model.records import MatrixRecord, Stopwatch
from quip.model.run import Run
from quip.model.sensitivity.files import read_felt
from quip.model.states import batch_size_for
from quip.model.tables import check_tables, pack_tables, table_totals
from quip.model.team import Team, joined


def run_experiment(experiment: Experiment) -> dict[str, Any]:
    """Run it and return the report, which `out` receives before and after each long stage.

    What is asked for is checked first, as far as it can be known without the model. A run that
    fails leaves a report of what it had reached, and of the reason. Of several processes the first
    alone writes, and asks tasks; the others return what they know.
    """
    with joined(experiment.device, exact=not experiment.fast_reduce) as team:
        check_request(team, experiment, choose_device(experiment.device))
        return _run(experiment if team.leads else _of_the_others(experiment), team)


def _of_the_others(e: Experiment) -> Experiment:
    """What is asked of the processes of a team but the first: to quantize and measure with it."""
    return replace(e, out=None, save=None, tasks=None)


def _run(experiment: Experiment, team: Team) -> dict[str, Any]:
    save = experiment.save and experiment.save.resolve()  # also if it is the folder we are in
    e, watch = settled(replace(experiment, save=save)), Stopwatch()
    folder, device = _check(e)
    with watch("load"):
        loaded = load_model(e.load or e.model, dtype=e.dtype, seqlen=e.seqlen, stream=e.stream)
        kept = _kept(e.recipe, loaded) if e.recipe else ()
        check_all_weights(loaded)
        if e.head_bits:
            check_tables(loaded.model)
    with watch("data"):
        source = _source(e, loaded) if e.recipe else None
        windows = token_sets(e.eval_datasets, loaded, seqlen=e.seqlen, nsamples=e.eval_nsamples)
    stamps = evaluation_entries(windows)
    check_inputs(team, {"model": loaded}, calibration=source and source.stamp, **stamps)
    ledger = _ledger(e, loaded, source, device, folder)
    fingerprint = ledger and ledger.fingerprint
    earlier = folder.earlier_report(fingerprint=fingerprint) if folder else {}
    entries = entries_of(e, loaded, device) | {
        "calibration": source and source.stamp,
        **stamps,
        "kept_matrices": list(kept),
        "fingerprint": fingerprint,
        "seconds": watch.seconds,
    }
    report = Report(entries, folder=folder, device=device)
    report.save("started")

    def measure(key: str, loaded: LoadedModel) -> None:
        measure_perplexities(key, windows, loaded, report, watch, earlier=earlier, team=team)

    with report.kept(), no_longer_than_this(ledger):
        tasks = fetched(e.tasks, loaded, watch, earlier=earlier)
        if e.compare and (e.recipe or e.load):
            original = (
                load_model(e.model, dtype=loaded.dtype_name, stream=e.stream) if e.load else loaded
            )
            measure("original_perplexity", original)
            del original
        if e.recipe and source:
            records = _quantize(e, e.recipe, source, loaded, report, watch, ledger, team)
            if e.head_bits:
                with watch("quantize"):
                    tables = pack_tables(loaded.model, e.head_bits, device=report.device)
                report.save("quantized", tables=table_totals(tables, report.entries["totals"]))
            if e.save:
                with watch("save"):
                    save_with_notes(
                        *(e.save, loaded, records, report),
                        parts=ledger.parts() if ledger else (),
                        overwrite=e.overwrite,
                        resume=e.resume,
                    )
        measure("perplexity", loaded)
        if e.tasks:
            measure_tasks(
                e.tasks, tasks, loaded, report, watch, batch_size=e.batch_size, earlier=earlier
            )
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
    if e.hessians is None:
        check_dataset(str(e.dataset), "calibration")
    check_measures(e.eval_datasets, e.tasks)
    return folder, device


def _kept(recipe: Recipe | Plan, loaded: LoadedModel) -> tuple[str, ...]:
    """The matrices that are not quantized, once it is known that all others have a recipe."""
    found = check_quantizable(loaded.model, loaded.name)
    Plan.of(recipe).recipes(found.quantized)
    return found.kept


def _source(e: Experiment, loaded: LoadedModel) -> Source:
    if e.hessians:
        store = store_for(e.hessians, loaded)
        check_weights_of(store, e, e.recipe)
        return store
    check_experts(loaded, e)
    return calibration_of(loaded, str(e.dataset), nsamples=e.nsamples, seqlen=e.seqlen, seed=e.seed)


def _ledger(
    e: Experiment,
    loaded: LoadedModel,
    source: Source | None,
    device: str,
    folder: RunFolder | None,
) -> Ledger | None:
    """Where finished blocks go, in the run's folder, with a fingerprint of all they depend on."""
    if source is None or (folder is None and loaded.stream is None):
        return None
    how = (e.recipe, e.tuning)
    fingerprint = fingerprint_of(
        *(loaded, source, *how),
        asked=e,
        device=torch.device(device),
        exact=not e.fast_reduce,
        beside={name: getattr(e, name) for name in ("target_shrink", "two_sided", "head_bits")},
    )
    blocks = folder.path / RunFolder.BLOCKS if folder else None
    ledger = ledger_for(loaded, fingerprint, source, blocks, beside=e.save)
    if folder:
        folder.open()
    try:
        ledger.open()
        _check_save(e, ledger.fingerprint)
    except QuipError:
        if folder:
            folder.release()
        raise
    return ledger


def _check_save(e: Experiment, fingerprint: Mapping[str, Any] | None = None) -> None:
    if e.save:
        inputs = (e.model, e.dataset, e.hessians, *e.eval_datasets)
        check_save(e.save, inputs, overwrite=e.overwrite, resume=e.resume, fingerprint=fingerprint)


def _quantize(
    e: Experiment,
    recipe: Recipe | Plan,
    source: Source,
    loaded: LoadedModel,
    report: Report,
    watch: Stopwatch,
    ledger: Ledger | None,
    team: Team,
) -> list[MatrixRecord]:
    run = Run(
        recipe=recipe,
        seed=e.seed,
        device=report.device,
        all_experts=e.all_experts,
        weighs=e.token_weights != NO_WEIGHTS,
        tuning=e.tuning,
        target_shrink=e.target_shrink,
        ledger=ledger,
        team=team,
        stream=loaded.stream,
        activations=Activations.within(e.activation_memory, ledger.folder if ledger else None),
        watch=watch,
    )
    records: list[MatrixRecord] = []
    if isinstance(source, HessianStore):
        run = replace(run, felt=read_felt(source.felt) if source.felt else None)
        found = quantize_from_store(loaded.model, source, run)
    else:
        batch_size = batch_size_for(source.seqlen, loaded.model, report.device)
        run = with_felt(e, loaded, source, replace(run, batch_size=batch_size))
        found = quantize_matrix_by_matrix(loaded.model, source.ids, run)
    try:
        records.extend(found)
        forget_felt(ledger)
    finally:
        if records:
            if e.tuning:
                report.entries["tuned"] = [
                    asdict(one) | {"within_noise": one.within_noise} for one in run.tuned
                ]
            report.save_matrices("quantized", records)
    return records
