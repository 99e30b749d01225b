"""A checkpoint tuned against the model that it was quantized from, as another checkpoint."""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quip.data import calibration_tokens, check_dataset
from quip.errors import QuipError, UsageError
from quip.files import check_new
from quip.jobs.alike import check_inputs, check_request
from quip.jobs.evaluate import default_seqlen
from quip.jobs.inspect import matrix_records
from quip.jobs.report.folder import read_report
from quip.jobs.report.report import Report
from quip.jobs.report.saved import save_with_notes, write_notes
from quip.jobs.report.words import CardWords
from quip.jobs.requests import Machine, Text
from quip.jobs.tasks import bar_wanted
from quip.model.device import choose_device, device_name
from quip.model.load import LoadedModel, load_model
from quip.model.passed import Passage, pass_blocks
from quip.model.records import Stopwatch, versions
from quip.model.team import Team, joined
from quip.model.tune.whole import ModelTuning, ModelTuningRecord, tune_model
from quip.packed.checkpoint import check_folder, check_replaced

log = logging.getLogger(__name__)

# Numbers of the checkpoint that is tuned, not of the tuned one; run.json keeps them under finetune.
MEASURED = ("perplexity", "tasks")
# What says that a folder is the checkpoint of a run that can be taken up, which it no longer is.
OF_THE_RUN = ("fingerprint", "tasks_asked", "tasks_terms", "error")


@dataclass(frozen=True, kw_only=True)
class FineTuning(Text, Machine):
    """Everything that one fine-tuning depends on."""

    checkpoint: Path
    dataset: str
    save: Path
    tuning: ModelTuning = field(default_factory=ModelTuning)
    teacher: str | None = None  # None: the model that run.json says it was quantized from
    stream: str = "auto"  # on, off, or auto: a teacher too large for memory goes block by block
    overwrite: bool = False
    flags: Mapping[str, object] = field(default_factory=dict)  # as given, for the report


def finetune_checkpoint(asked: FineTuning) -> ModelTuningRecord:
    """Tune a checkpoint and write the result to `save`; if nothing improved, nothing is written.

    The new run.json is that of the checkpoint, with what tuning came to under "finetune", and
    without what was measured before it. Several processes share the windows of each step, and the
    first of them writes.
    """
    with joined(asked.device) as team:
        return _tune(asked, team)


def _tune(asked: FineTuning, team: Team) -> ModelTuningRecord:
    device, earlier = _check(asked, team), read_report(asked.checkpoint, CardWords)
    check_request(team, asked, device)
    _warn(asked, team)
    watch = Stopwatch()
    with watch("load"):
        # Without its blocks, until those of a teacher that is streamed have done their work.
        loaded = _student(asked, "off" if asked.stream == "off" else "on")
        teacher = _teacher(asked, earlier, loaded)
    with watch("data"):
        tokens = calibration_tokens(
            asked.dataset,
            loaded.tokenizer,
            nsamples=asked.nsamples,
            seqlen=asked.seqlen or default_seqlen(loaded),
            seed=asked.seed,
        )
    models = {"checkpoint": loaded, "teacher": teacher}
    check_inputs(team, models, tokens=tokens.stamp, report=earlier)
    passed = None
    if teacher.stream:
        with watch("teacher"):
            passed = pass_blocks(
                teacher.model,
                tokens.ids,
                Passage(device=device, progress=bar_wanted()),
                stream=teacher.stream,
                what="the teacher's KL divergence",
            )
    if loaded.stream:
        with watch("load"):
            loaded = _student(asked, "off")
    with watch("tune"):
        record = tune_model(
            loaded.model,
            teacher.model,
            tokens.ids,
            asked.tuning,
            device=device,
            seed=asked.seed,
            passed=passed,
            team=team,
        )
    if record.improved and team.leads:
        entry = {
            "teacher": teacher.name,
            "tokens": tokens.stamp,
            "tuning": asdict(asked.tuning),
            **asdict(record),
            "within_noise": record.within_noise,
            "seed": asked.seed,
            "device": device_name(device),
            "versions": versions(),
            "flags": dict(asked.flags),
            "seconds": watch.seconds,
        }
        _save(asked, loaded, earlier, entry, device)
    return record


def _warn(asked: FineTuning, team: Team) -> None:
    """Say where processes will be idle. Raises UsageError where there are too few windows."""
    asked.tuning.held(asked.nsamples)
    step = asked.tuning.batch_size
    if step < team.size and team.leads:
        log.warning(
            "a step has %d windows, and there are %d processes: %d wait, but where losses are "
            "compared; --batch_size %d occupies all",
            *(step, team.size, team.size - step, team.size),
        )


def _check(asked: FineTuning, team: Team) -> str:
    """Whatever can be refused before a model is loaded; returns the device."""
    check_folder(asked.checkpoint)
    save = asked.save.resolve()
    if team.leads:  # which writes it
        check_new(asked.save, "--save", overwrite=asked.overwrite)
        check_replaced(asked.save)
    for name in (asked.checkpoint, asked.dataset, asked.teacher):
        if name is not None and Path(name).expanduser().resolve().is_relative_to(save):
            raise UsageError(f"--save {asked.save}: {name} is in it, and would be lost")
    check_dataset(asked.dataset, "calibration")
    return choose_device(asked.device)


def _student(asked: FineTuning, stream: str) -> LoadedModel:
    folder = os.path.join(".", asked.checkpoint)  # ./demo is a folder, demo is not
    return load_model(folder, dtype=asked.dtype, seqlen=asked.seqlen, stream=stream)


def _teacher(asked: FineTuning, earlier: Mapping[str, Any], loaded: LoadedModel) -> LoadedModel:
    """The original, in the dtype of the checkpoint."""
    name = asked.teacher or earlier.get("model")
    if not name:
        raise UsageError(
            f"{asked.checkpoint}: its run.json does not say which model it was quantized from; "
            "name that with --teacher"
        )
    try:
        return load_model(name, dtype=loaded.dtype_name, seqlen=asked.seqlen, stream=asked.stream)
    except QuipError as error:
        if asked.teacher:
            raise
        raise type(error)(
            f"{error} (run.json names it as what was quantized: say where it is with --teacher)"
        ) from error


def _save(
    asked: FineTuning,
    loaded: LoadedModel,
    earlier: Mapping[str, Any],
    entry: Mapping[str, Any],
    device: str,
) -> None:
    """The checkpoint with its notes. Perplexity and tasks are to be measured anew."""
    before = {key: earlier[key] for key in MEASURED if key in earlier}
    left = {k: x for k, x in earlier.items() if k not in (*MEASURED, *OF_THE_RUN)}
    entries = left | {"finetune": {**entry, "before": before}, "dtype": loaded.dtype_name}
    report = Report(entries, folder=None, device=device)
    try:
        records = matrix_records(asked.checkpoint)
    except QuipError:  # a checkpoint without run.json is whole
        records = []
    save_with_notes(asked.save, loaded, records, report, overwrite=asked.overwrite, resume=False)
    report.save("complete")
    write_notes(asked.save, report)
