"""What is measured of a whole model, each number written down as soon as it is known.

`run_evaluation` measures a model or checkpoint as it is; quip/jobs/run.py measures what it has
just quantized with the same functions, so that both give the same numbers.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quip.data import TokenSet, check_dataset, evaluation_tokens
from quip.errors import UsageError, finite
from quip.evaluate.divergence import divergence
from quip.evaluate.perplexity import perplexity
from quip.evaluate.zeroshot import ZeroShot, check_tasks
from quip.jobs.agreement import measure_agreement
from quip.jobs.alike import check_inputs, check_request
from quip.jobs.report.folder import RunFolder, read_report
from quip.jobs.report.report import Report
from quip.jobs.requests import Machine, Place
from quip.jobs.speed import measure_speed
from quip.jobs.tasks import bar_wanted, fetched, measure_tasks, named
from quip.model.device import choose_device, device_name
from quip.model.load import LoadedModel, load_model
from quip.model.records import Stopwatch, versions
from quip.model.team import ALONE, Team, joined

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Machine, Place):
    """Everything that one evaluation depends on."""

    model: str
    datasets: tuple[str, ...] | None = None  # None: those of the run that saved the checkpoint
    nsamples: int | None = None  # windows of each data set, the first ones
    seqlen: int | None = None  # None: as in that run, or the model's positions, at most 2048
    tasks: ZeroShot | None = None
    batch_size: int = 8  # of tasks
    perplexity: bool = True  # whether that is measured, of the reference too
    reference: str | None = None  # the original, which predictions are compared with
    agreement: int | None = None  # prompts of each data set that both models go on with
    speed: bool = False
    stream: str = "auto"  # on, off, or auto: what is too large for memory goes block by block
    speed_batch: tuple[int, ...] = ()  # texts side by side whose speed is measured beside that of 1
    flags: Mapping[str, object] = field(default_factory=dict)  # as given, for the report


def run_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Measure what is asked for and return the report, which `out` receives as it grows.

    Several processes share the windows; tasks and speed are the first one's alone, which writes.
    """
    with joined(evaluation.device) as team:
        return _run(evaluation, team)


def _run(evaluation: Evaluation, team: Team) -> dict[str, Any]:
    saved, watch = _saved_report(evaluation.model), Stopwatch()
    e = _as_when_saved(evaluation, saved.get("evaluation", {}))
    folder = RunFolder(e.out, overwrite=e.overwrite) if e.out and team.leads else None
    device = choose_device(e.device)
    check_request(team, e, device)
    check_measures(e.datasets or (), e.tasks)
    with watch("load"):
        loaded = load_model(e.model, dtype=e.dtype, seqlen=e.seqlen, stream=e.stream)
        texts = {"--agreement": e.agreement}
        check_whole(loaded, {"--tasks": e.tasks, "--speed": e.speed, **texts})
        reference = e.reference and load_model(
            e.reference, dtype=loaded.dtype_name, seqlen=e.seqlen, stream=e.stream
        )
        if reference:
            check_whole(reference, texts)
    with watch("data"):
        tokens = token_sets(e.datasets or (), loaded, seqlen=e.seqlen, nsamples=e.nsamples)
    stamps = evaluation_entries(tokens)
    models = {"model": loaded} | ({"reference": reference} if reference else {})
    check_inputs(team, models, **stamps)
    entries = {
        "model": e.model,
        "method": saved.get("method", "as it is"),
        "flags": dict(e.flags),
        "device": device_name(device),
        "dtype": loaded.dtype_name,
        "versions": versions(),
        **stamps,
        "seconds": watch.seconds,
    }
    report = Report(entries, folder=folder, device=device)
    report.save("started")
    with report.kept():
        tasks = fetched(e.tasks if team.leads else None, loaded, watch)
        if reference and e.perplexity:
            measure_perplexities("original_perplexity", tokens, reference, report, watch, team=team)
        if e.perplexity:
            measure_perplexities("perplexity", tokens, loaded, report, watch, team=team)
        if reference:
            _measure_divergence(tokens, loaded, reference, report, watch, team)
        if reference and e.agreement:
            measure_agreement(tokens, loaded, reference, report, watch, e.agreement, team=team)
        if e.tasks and team.leads:
            measure_tasks(e.tasks, tasks, loaded, report, watch, batch_size=e.batch_size)
        if e.speed and team.leads:
            del reference  # its memory is not the model's
            measure_speed(loaded, report, watch, sorted({1, *e.speed_batch}))
        report.save("complete")
    return report.entries


def check_measures(datasets: tuple[str, ...], tasks: ZeroShot | None) -> None:
    """Whatever can be refused before a model is loaded."""
    for name in datasets:
        check_dataset(name, "evaluation")
    if tasks:
        check_tasks(tasks)


def check_whole(loaded: LoadedModel, wanted: Mapping[str, object]) -> None:
    """Raise UsageError for what needs all of a model at once, of one that is streamed.

    `wanted` has flags, and whether each was given.
    """
    if loaded.stream and (flag := next((flag for flag, asked in wanted.items() if asked), None)):
        raise UsageError(
            f"{flag}: it needs the whole model in memory, and {loaded.name} is streamed block by "
            f"block; leave out {flag}, or say --stream off"
        )


def token_sets(
    datasets: tuple[str, ...], loaded: LoadedModel, *, seqlen: int | None, nsamples: int | None
) -> dict[str, TokenSet]:
    """The windows that each perplexity is taken over, by name of the data set."""
    seqlen = seqlen or default_seqlen(loaded)
    return {
        name: evaluation_tokens(name, loaded.tokenizer, seqlen=seqlen, nsamples=nsamples)
        for name in datasets
    }


def evaluation_entries(token_sets: Mapping[str, TokenSet]) -> dict[str, Any]:
    """What the report says of the windows: a stamp of each set, and how much it is of the whole."""
    return {
        "evaluation": {name: tokens.stamp for name, tokens in token_sets.items()},
        "windows": {
            name: {"measured": len(tokens.ids), "of": tokens.of}
            for name, tokens in token_sets.items()
        },
    }


def default_seqlen(loaded: LoadedModel) -> int:
    return min(2048, loaded.max_length)


def measure_perplexities(
    key: str,
    token_sets: Mapping[str, TokenSet],
    loaded: LoadedModel,
    report: Report,
    watch: Stopwatch,
    *,
    earlier: Mapping[str, Any] | None = None,
    team: Team = ALONE,
) -> None:
    """Perplexity on each data set, except where `earlier`, a report, has it of the same windows.

    Of a team the first process has it. Raises NonFinite at the first that is not finite; those
    before are in the report.
    """
    found: dict[str, float] = {}
    before, what = earlier or {}, key.replace("_", " ")
    known, stamps = before.get(key) or {}, before.get("evaluation", {})
    for name, tokens in token_sets.items():
        same = stamps.get(name) == tokens.stamp
        value = team.tell(float(known.get(name, math.nan)) if same else math.nan)
        if not math.isfinite(value):
            with watch("evaluate"), named(f"{what} on {name}"):
                value = perplexity(
                    loaded.model,
                    tokens.ids,
                    device=report.device,
                    progress=bar_wanted(),
                    stream=loaded.stream,
                    team=team,
                )
        found[name] = finite(value, f"{what} on {name}")
        log.info("%s: %s %.4f", name, what, value)
        report.save("evaluating", **{key: found})


def _measure_divergence(
    token_sets: Mapping[str, TokenSet],
    loaded: LoadedModel,
    reference: LoadedModel,
    report: Report,
    watch: Stopwatch,
    team: Team,
) -> None:
    found: dict[str, Any] = {}
    for name, tokens in token_sets.items():
        with watch("evaluate"), named(name):
            moved = divergence(
                loaded.model,
                reference.model,
                tokens.ids,
                device=report.device,
                progress=bar_wanted(),
                stream=loaded.stream,
                reference_stream=reference.stream,
                team=team,
            )
        found[name] = asdict(moved)
        report.save("evaluating", divergence=found)


def _as_when_saved(e: Evaluation, saved: Mapping[str, Any]) -> Evaluation:
    """The data sets and windows of `saved`, by name, where none are asked for."""
    if e.datasets is not None:
        return e
    wanted = e.reference is not None or not (e.tasks or e.speed)
    if wanted and not saved:
        raise UsageError(
            f"{e.model} is no checkpoint whose run measured perplexities: say where to measure "
            "with --datasets (or ask for --tasks or --speed alone)"
        )
    stamps = list(saved.values()) if wanted else []
    return replace(
        e,
        datasets=tuple(one["dataset"] for one in stamps),
        seqlen=e.seqlen or next((one["seqlen"] for one in stamps), None),
        nsamples=e.nsamples or max((one["windows"] for one in stamps), default=None),
    )


def _saved_report(model: str) -> dict[str, Any]:
    """What the run reported that saved this checkpoint; `demo` is always the packaged model."""
    return {} if model == "demo" else read_report(Path(model).expanduser())
