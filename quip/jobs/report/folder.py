"""The folder of one run: written to by one run at a time, each file complete or not there."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from quip.errors import Unavailable, UsageError
from quip.files import check_new, replacing, write_csv, writing
from quip.jobs.report.plots import write_plot
from quip.jobs.report.words import RunWords
from quip.model.records import MatrixRecord
from quip.reading import parse_json, read_json

LOCK = ".lock"  # there while a run writes; after a kill it may be there, but is not locked

REMEDY = "remove it if what it knows may be lost"


class RunFolder:
    """The folder of one run, made when something is first written to it.

    What is written appears under its name only when it is complete. While a run writes to the
    folder no other can.
    """

    FILES = ("run.json", "layers.csv", "layers.png")
    BLOCKS = "blocks"  # the finished blocks, for --resume

    def __init__(
        self, path: Path, *, overwrite: bool = False, resume: bool = False, flag: str = "--out"
    ) -> None:
        """Raises UsageError for a path (the value of `flag`) that cannot be made, that is in use
        by another run, or that holds files not to be lost."""
        self.path, self.resume, self.flag = path, resume, flag
        self._lock: int | None = None
        if (path / LOCK).exists():  # of a run that goes on, or of one that was killed
            self._take()
            self.release()
        has_blocks = (path / self.BLOCKS).is_dir()
        if has_blocks and not (resume or overwrite):
            raise UsageError(
                f"{flag} {path}: it holds an earlier run; take it up with --resume, start over "
                "with --overwrite, or name another folder"
            )
        check_new(path, flag, overwrite=overwrite or (resume and has_blocks))

    def earlier_report(self, **same: Any) -> dict[str, Any]:
        """run.json as the run before left it, if this one takes it up and it says the same of
        these entries. Raises Unavailable, and lets others in, where that is damaged."""
        try:
            found = read_report(self.path) if self.resume else {}
        except Unavailable:
            self.release()
            raise
        return found if all(found.get(key) == value for key, value in same.items()) else {}

    def write_report(self, report: Mapping[str, Any]) -> None:
        """run.json."""
        self.open()
        with replacing(self.path / "run.json") as partial:
            partial.write_text(as_json(report))

    def write_layers(self, records: Sequence[MatrixRecord]) -> None:
        """layers.csv, and layers.png where matplotlib is installed."""
        self.open()
        write_csv(self.path / "layers.csv", [asdict(record) for record in records])
        write_plot(records, self.path)

    def open(self) -> None:
        """Make the folder, keep other runs out, and clear away the run before, unless taken up."""
        if self._lock is not None:
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        if not self.resume:  # one folder never mixes two runs
            for name in self.FILES:
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / self.BLOCKS, ignore_errors=True)

    def release(self) -> None:
        """Let others in. The end of the process, however it comes, does the same."""
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _take(self) -> None:
        with writing(self.path):
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise UsageError(
                f"{self.flag} {self.path}: another run is writing to it; name another folder, or "
                "wait"
            ) from error
        self._lock = lock


def read_report(folder: Path, shape: Any = RunWords) -> dict[str, Any]:
    """The run.json of a folder; empty where there is none. Raises Unavailable for a damaged one."""
    return read_words(folder / "run.json", shape)


def read_words(path: Path, shape: Any) -> dict[str, Any]:
    """What a file of measures says; nothing where there is none.

    Raises Unavailable for one that is damaged: measured again, its numbers would be lost unsaid.
    """
    if not os.path.exists(path):  # unlike Path.exists, for any name
        return {}
    parse = partial(parse_json, constants=True)  # older ones may say NaN
    return read_json(path, shape, remedy=REMEDY, parse=parse)


def as_json(report: Mapping[str, Any]) -> str:
    """JSON has no NaN or infinity: they are the strings nan, inf and -inf."""
    return json.dumps(_as_json(report), indent=2, allow_nan=False) + "\n"


def _as_json(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(key): _as_json(item) for key, item in value.items()}
        case list() | tuple():
            return [_as_json(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case None | bool() | int() | float() | str():
            return value
    return str(value)  # a path
