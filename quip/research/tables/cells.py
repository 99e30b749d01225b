"""The cells of a table: which there are, which are done, and how one is run.

    DIR/cells/MODEL/FLAGS-DIGEST/run.json

A cell is kept by what is run (model, flags, calibration), not by the table that asked: another
table that wants the same run finds it there, and adds what it measures. It is done when all
that is measured is there; a run that was killed goes on after its last block.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from quip.data import DATASETS
from quip.evaluate.zeroshot import ZeroShot
from quip.files import make_folder, replacing
from quip.jobs.report.folder import as_json, read_report, read_words
from quip.jobs.report.words import MeasuredWords
from quip.jobs.requests import Machine, Text
from quip.model.records import versions
from quip.research.tables.description import COMPARED, Line, Measure, Table
from quip.research.tables.tuning import FINETUNE

MEASURED = "measured.json"  # beside run.json, which is that of the last run alone
GROWING = ("perplexity", "tasks", "divergence", "agreement")  # what several runs of a cell add to
EVALUATED = ("mean_perplexity", COMPARED, *GROWING)  # first words of the paths of such measures
MEASURING = ("evaluate", "tasks", "speed")  # stages that make nothing of a model


@dataclass(frozen=True, kw_only=True)
class Settings(Text, Machine):
    """How cells are run: what a user may set beside what a table says."""

    dataset: str
    evaluate: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    eval_nsamples: int | None = None
    limit: int | None = None  # documents of each task
    storycloze_csv: Path | None = None
    batch_size: int = 8  # of tasks

    def zero_shot(self) -> ZeroShot | None:
        if not self.tasks:
            return None
        return ZeroShot(tasks=self.tasks, limit=self.limit, storycloze_csv=self.storycloze_csv)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a model with the flags of a row and a column."""

    model: str
    flags: Mapping[str, Any]
    kind: str
    settings: Settings
    measures: tuple[Measure, ...]
    root: Path = field(compare=False)

    @property
    def folder(self) -> Path:
        """Where its report is, by what is run; what is measured of it may grow."""
        s, flags = self.settings, dict(sorted(self.flags.items()))
        calibration = [identity(s.dataset), s.nsamples, s.seed]
        depends = {
            "model": identity(self.model),
            "flags": flags,
            "kind": self.kind,
            "calibration": [] if flags.get("wbits") == 16 else calibration,
            "form": [s.seqlen, s.dtype, s.eval_nsamples, s.limit],
        }
        words = [self.kind] if self.kind != "run" else []
        words += [k if v is True else f"{k}-{v}" for k, v in flags.items()]
        name = f"{slug('-'.join(words))}-{digest(depends)}"
        return self.root / "cells" / slug(self.model) / name

    @property
    def source(self) -> "Cell":
        """The run whose checkpoint this cell measures or tunes; of a run, itself."""
        if self.kind == "run":
            return self
        flags = {name: value for name, value in self.flags.items() if name != FINETUNE}
        evaluated = tuple(m for m in self.measures if m.path[0] in EVALUATED)
        return replace(self, kind="run", flags=flags, measures=evaluated)

    @property
    def checkpoint(self) -> Path:
        """Where that checkpoint is, as long as a cell that starts from it is missing."""
        return self.source.folder / "checkpoint"

    @property
    def compares(self) -> bool:
        """Whether what it makes is compared with the original, which is equal to itself."""
        asked = any(measure.path[0] == COMPARED for measure in self.measures)
        return asked and self.flags.get("wbits") != 16

    def leaves_out(self, measure: Measure) -> bool:
        """Whether it never has such a number, however it is measured."""
        return measure.path[0] == COMPARED and not self.compares

    @property
    def files(self) -> dict[str, Any]:
        """The local texts that it is measured on, as they are."""
        return {name: known for name in self.settings.evaluate if (known := identity(name)[1:])}

    def report(self) -> dict[str, Any]:
        """What it has come to: the last run, and what runs of the same codes measured before."""
        run, found, versions = self._read()
        if run.get("status") != "complete":  # totals may be those of a part
            run = {key: run[key] for key in ("status",) if key in run}
        files = self.files
        known = {
            name: float(found["perplexity"][name])
            for name in self.settings.evaluate
            if name in found["perplexity"] and versions.get(name, []) == files.get(name, [])
        }
        compared = [
            {**found["divergence"].get(name, {}), **found["agreement"].get(name, {})}
            for name in known
        ]
        whole = len(known) == len(self.settings.evaluate) > 0
        mean = fmean(known.values()) if whole else None
        right = [found["tasks"].get(task, {}).get("acc") for task in self.settings.tasks]
        made = [s for stage, s in run.get("seconds", {}).items() if stage not in MEASURING]
        return {
            **run,
            **found,
            "perplexity": known,
            "mean_perplexity": mean,
            COMPARED: _means(compared) if whole else {},
            "mean_accuracy": fmean(right) if right and None not in right else None,
            "minutes": sum(made) / 60 if made else None,  # of making it, not of measuring it
        }

    def write(self, numbers: Mapping[str, Any]) -> None:
        """run.json, of a cell that is no run of its own."""
        make_folder(self.folder)
        report = {
            "model": self.model,
            "flags": dict(self.flags),
            "versions": versions(),
            "status": "complete",
            **numbers,
        }
        with replacing(self.folder / "run.json") as partial:
            partial.write_text(as_json(report))

    def keep(self, compared: Mapping[str, Any] | None = None) -> None:
        """Add what the last run measured to what runs of the same codes did before.

        `compared` is what it came to beside the original, the report of an evaluation.
        """
        run, found, files = self._read()
        files |= self.files
        for key in GROWING:
            found[key] |= (compared or {}).get(key) or {}
        with replacing(self.folder / MEASURED) as partial:
            partial.write_text(
                as_json({"fingerprint": run.get("fingerprint"), "files": files, **found})
            )

    def _read(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The last run; what it and runs of the same codes before it measured; on which texts."""
        run, before = read_report(self.folder), read_words(self.folder / MEASURED, MeasuredWords)
        if before.get("fingerprint") != run.get("fingerprint"):
            before = {}
        found = {key: {**before.get(key, {}), **(run.get(key) or {})} for key in GROWING}
        return run, found, before.get("files", {})

    def missing(self) -> tuple[Measure, ...]:
        """What is still to be measured."""
        report = self.report()
        return tuple(
            measure
            for measure in self.measures
            if measure.of(report) is None
            and not has_none(measure, report)
            and not self.leaves_out(measure)
        )


def _means(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean over texts of each number that all of them have."""
    names = [name for name in found[0] if all(name in one for one in found)]
    return {name: fmean(float(one[name]) for one in found) for name in names}


def has_none(measure: Measure, report: Mapping[str, Any]) -> bool:
    """Whether a complete cell has no such number, as the original model has no bits per weight."""
    return report.get("status") == "complete" and measure.path[0] not in EVALUATED


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def slug(text: str) -> str:
    """As part of a file's name; of a file its name alone."""
    path = Path(text)
    name = path.stem if path.suffix == ".gguf" else path.name
    return re.sub(r"[^\w.]+", "-", name).strip("-.") or "model"


def identity(name: str) -> list[Any]:
    """A name, and of a file or folder of this machine what tells its versions apart."""
    if name == "demo" or name in DATASETS:  # whatever else is called so here
        return [name]
    path = Path(name).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    stats = [(file.name, file.stat()) for file in files]
    return [name, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def cells(table: Table, models: Sequence[str], settings: Settings, root: Path) -> Iterator[Cell]:
    """Every different cell of the table, model by model."""
    seen = set()
    for model in models:
        for row in table.rows:
            for column in table.columns:
                if not row.is_run:
                    continue
                cell = cell_of(table, model, row, column, settings, root)
                if cell.folder not in seen:
                    seen.add(cell.folder)
                    yield cell


def cell_of(
    table: Table, model: str, row: Line, column: Line, settings: Settings, root: Path
) -> Cell:
    flags = table.flags_of(row, column)
    return Cell(
        model=model,
        flags=flags,
        kind="tuned" if FINETUNE in flags else table.kind,
        settings=settings,
        measures=table.measures,
        root=root,
    )
