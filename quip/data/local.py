"""Texts in local files: .txt whole; .json, .jsonl and .parquet by their column `text`."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from quip.data.sources import Part
from quip.errors import Unavailable, UsageError, one_line, shown
from quip.reading import check_regular, parse_json

COLUMN = "text"


def local_part(path: Path, split: Literal["train", "test"]) -> Part:
    """A file, or the files of a folder in the order of their names.

    A folder whose files are named after splits (train*, valid*, test*) gives the files of the one
    asked for; anything else is used whole for both purposes.
    """
    if not path.is_dir():
        return Part(lambda _: _documents(path), "whole", "\n\n")
    files = sorted(file for file in path.iterdir() if file.suffix in READERS)
    if not files:
        raise UsageError(f"{path}: holds no {', '.join(READERS)} file")
    names = listed(file.name for file in files)
    if not any(file.stem.startswith(("train", "valid", "test")) for file in files):
        return _files(files, "whole")
    files = [file for file in files if file.stem.startswith(split)]
    if not files:
        raise UsageError(f"{path}: no file {split}* among {names}; name one file instead")
    return _files(files, split)


def _files(files: list[Path], split: str) -> Part:
    return Part(lambda _: [text for file in files for text in _documents(file)], split, "\n\n")


def _documents(path: Path) -> list[str]:
    if path.suffix not in READERS:
        raise UsageError(f"{path}: not a file that can be read; use {', '.join(READERS)}")
    check_regular(path)
    try:
        return READERS[path.suffix](path)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read ({error.strerror or error})") from error


def _whole(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode()  # not read_text, which rewrites line ends
    except UnicodeDecodeError as error:
        raise Unavailable(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}); convert the file"
        ) from error
    return [text.removeprefix("\ufeff")]  # a mark of the encoding, and no text


def _json(path: Path) -> list[str]:
    """One list of records, or one record a line: both are found under both suffixes."""
    [text] = _whole(path)
    try:
        value = parse_json(text, constants=True, values=math.inf)  # of any size
        records = value if isinstance(value, list) else [value]
    except ValueError as error:
        if not isinstance(error.__cause__, json.JSONDecodeError):
            raise Unavailable(f"{path}: cannot be used ({error}); repair the file") from error
        lines = enumerate(text.split("\n"), start=1)  # not splitlines: U+2028 may stand in a string
        records = [_record(path, number, line) for number, line in lines if line.strip()]
    return [_column(path, record) for record in records]


def _record(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line, constants=True, values=math.inf)
    except ValueError as error:
        damaged = isinstance(error.__cause__, json.JSONDecodeError)
        what = "is not JSON" if damaged else "cannot be used"
        raise Unavailable(f"{path}: line {number} {what} ({error}); repair the file") from error


def _column(path: Path, record: Any) -> str:
    columns = list(record) if isinstance(record, dict) else []
    if COLUMN not in columns:
        raise UsageError(_no_column(path, columns))
    if not isinstance(record[COLUMN], str):
        raise UsageError(
            f"{path}: {COLUMN} is {shown(record[COLUMN])} in a record; it must be a string"
        )
    return record[COLUMN]


def _parquet(path: Path) -> list[str]:
    from pyarrow import ArrowException, parquet  # comes with datasets

    try:
        table = parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        if COLUMN not in columns:
            raise UsageError(_no_column(path, columns))
        return [_column(path, record) for record in table.read([COLUMN]).to_pylist()]
    except (ArrowException, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise Unavailable(f"{path}: cannot be read as parquet ({reason}); write it anew") from error


def _no_column(path: Path, columns: list[str]) -> str:
    return f"{path}: no column `{COLUMN}`; found columns: {listed(columns) or 'none'}"


def listed(names: Iterable[str]) -> str:
    """Foreign names on one line of at most 200 characters, for a message."""
    text = ", ".join(names)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:180]} and more"


READERS = {".txt": _whole, ".json": _json, ".jsonl": _json, ".parquet": _parquet}
