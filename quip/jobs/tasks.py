"""Zero-shot tasks of a job: fetched before the long work, asked after it, each score kept."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from quip.errors import NonFinite, finite
from quip.evaluate.cloze import story_digest
from quip.evaluate.zeroshot import ZeroShot, fetch_tasks, zeroshot
from quip.jobs.report.report import Report
from quip.model.load import LoadedModel
from quip.model.records import Stopwatch, versions

log = logging.getLogger(__name__)


def fetched(
    asked: ZeroShot | None,
    loaded: LoadedModel,
    watch: Stopwatch,
    *,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, list[Any]]:
    """The tasks by name, with their data, except where `earlier`, a report, has their scores."""
    found: dict[str, list[Any]] = {}
    if asked is None:
        return found
    for name in set_aside(asked, earlier)[1]:
        log.info("task %s: its data are fetched", name)
        with watch("data"):
            found[name] = fetch_tasks(replace(asked, tasks=(name,)), loaded.model, loaded.tokenizer)
    return found


def measure_tasks(
    asked: ZeroShot,
    tasks: Mapping[str, list[Any]],
    loaded: LoadedModel,
    report: Report,
    watch: Stopwatch,
    *,
    batch_size: int,
    earlier: Mapping[str, Any] | None = None,
) -> None:
    """Each task in turn, except where `earlier`, a report, has it as it is asked for.

    `tasks` are what `fetched` made of the others. A group or a tag of lm-eval has several rows of
    results. Raises NonFinite for a score that is not finite, once it is in the report.
    """
    known, _ = set_aside(asked, earlier)
    rows: dict[str, list[str]] = {}
    found: dict[str, Mapping[str, float | int]] = {}
    for name in asked.tasks:
        scores = known.get(name)
        if scores is None:
            with watch("tasks"), named(name):
                scores = zeroshot(
                    loaded.model,
                    loaded.tokenizer,
                    replace(asked, tasks=(name,)),
                    device=report.device,
                    batch_size=batch_size,
                    progress=bar_wanted(),
                    tasks=tasks[name],
                )
        for row, values in scores.items():
            log.info("%s: %s", row, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        rows[name] = list(scores)
        found |= scores
        report.save("evaluating", tasks=found, tasks_asked=rows, tasks_terms=_terms(asked))
        for row, values in scores.items():
            for key, value in values.items():
                if not key.endswith("_stderr"):  # of a single document it is NaN
                    finite(float(value), f"{row}: {key}")


def set_aside(
    asked: ZeroShot, earlier: Mapping[str, Any] | None
) -> tuple[dict[str, dict[str, dict[str, float | int]]], tuple[str, ...]]:
    """The scores that a report has of these tasks, as they are asked for; the names of the rest."""
    before = earlier or {}
    same = before.get("tasks_terms") == _terms(asked)
    known = before.get("tasks_asked", {}) if same else {}
    scores = before.get("tasks") or {}
    found = {
        name: {row: _numbers(scores[row]) for row in known[name]}
        for name in asked.tasks
        if name in known and {*known[name]} <= scores.keys()
    }
    return found, tuple(name for name in asked.tasks if name not in found)


def _terms(asked: ZeroShot) -> dict[str, Any]:
    """What a score depends on beside the model and the task's name."""
    found = versions()
    return {
        "num_fewshot": asked.num_fewshot,
        "limit": asked.limit,
        "storycloze_csv": asked.storycloze_csv and story_digest(asked.storycloze_csv),
        "versions": {name: found.get(name) for name in ("python", "lm-eval")},
    }


def _numbers(scores: Mapping[str, Any]) -> dict[str, float | int]:
    """Scores as run.json holds them, where NaN and infinity are words."""
    return {key: float(v) if isinstance(v, str) else v for key, v in scores.items()}


@contextmanager
def named(what: str) -> Iterator[None]:
    """A measure that is not finite says of which text it is."""
    try:
        yield
    except NonFinite as error:
        raise NonFinite(f"{what}: {error}") from error


def bar_wanted() -> bool:
    """Whether somebody looks at the progress."""
    return sys.stderr.isatty()
