"""A table as Markdown, for a person, and as rows for a program."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from quip.research.tables.cells import slug

FLAGS = {  # of `quip table`, for what a record says of its settings
    "dataset": "dataset",
    "eval_datasets": "evaluate",
    **{name: name for name in ("tasks", "nsamples", "seqlen", "eval_nsamples", "limit", "seed")},
    "dtype": "dtype",
}
USUAL = {"nsamples": 128, "seed": 0, "dtype": "auto"}
WIDE = 9  # numbers in a line of a table, at most: what has more is two tables
MARKS = {"missed": " missed", "failed": "failed", "not run": "-", "none": ""}


def markdown(record: Mapping[str, Any]) -> str:
    """The record of a table, a part for each model: ours, and the paper's after the stroke."""
    parts = [f"## {record['title']}", f"{record['source']}."]
    for model in dict.fromkeys(entry["model"] for entry in record["entries"]):
        parts.append(_part(model, [e for e in record["entries"] if e["model"] == model]))
    return "\n\n".join([*parts, *_legend(record)]) + "\n"


def command(record: Mapping[str, Any]) -> str:
    """The line that makes the table; files of this machine by their names alone."""
    models = dict.fromkeys(entry["model"] for entry in record["entries"])
    words = [f"quip table {record['table']} --models {','.join(models)}"]
    for flag, key in FLAGS.items():
        value = record["settings"][key]
        if value not in (None, [], USUAL.get(key)):
            words.append(f"--{flag} {','.join(value) if isinstance(value, list) else value}")
    return " ".join(words)


def _part(model: str, found: Sequence[Mapping[str, Any]]) -> str:
    rows, columns, measures = (
        list(dict.fromkeys(entry[key] for entry in found)) for key in ("row", "column", "measure")
    )
    by_place = {(e["row"], e["column"], e["measure"]): e for e in found}
    several = len(columns) > 1, len(measures) > 1
    named = several if any(several) else (True, False)
    places = [(column, measure) for column in columns for measure in measures]
    size = math.ceil(len(places) / math.ceil(len(places) / WIDE))
    parts = [places[lo : lo + size] for lo in range(0, len(places), size)]
    return "\n\n".join(
        _grid(slug(model), _heads(part, named), {r: [by_place[r, *p] for p in part] for r in rows})
        for part in parts
    )


def _heads(places: Sequence[tuple[str, str]], named: tuple[bool, bool]) -> list[str]:
    """The label of each column and measure, as far as there are several of them."""
    return [" ".join(itertools.compress(place, named)) for place in places]


def _grid(
    corner: str, heads: Sequence[str], lines: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    found = [f"| {corner} | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    found += [f"| {row} | {' | '.join(map(_words, line))} |" for row, line in lines.items()]
    return "\n".join(found)


def _words(entry: Mapping[str, Any]) -> str:
    ours = MARKS[entry["state"]] if entry["ours"] is None else number(entry["ours"])
    papers = "" if entry["paper"] is None else f" / {number(entry['paper'])}"
    return ours + papers + (MARKS["missed"] if entry["state"] == "missed" else "")


def number(value: float | str) -> str:
    """Four digits or so."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e5:
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.1 or value == 0:
        return f"{value:.2f}" if size < 100 else f"{value:.1f}"
    return f"{value:.2g}" if size < 1e-4 else f"{value:.5f}"


def _legend(record: Mapping[str, Any]) -> list[str]:
    states = {entry["state"] for entry in record["entries"]}
    words = []
    if any(entry["paper"] is not None for entry in record["entries"]):
        words.append("Ours / the paper's.")
    if "missed" in states:
        words.append("Missed: more than 5 % worse than the paper's.")
    if "not run" in states:
        words.append("A dash was not run.")
    words.append(_settings(record))
    return [" ".join(filter(None, [*words, record.get("note")]))]


def _settings(record: Mapping[str, Any]) -> str:
    s = record["settings"]
    length = f" of {s['seqlen']} tokens" if s["seqlen"] else ""
    words = [f"Calibrated on {s['nsamples']} windows{length} of {s['dataset']}"]
    texts = {
        text["dataset"]: f" ({text['windows']} windows of {text['seqlen']} tokens, SHA-256 "
        f"{text['sha256'][:8]})"
        for text in record.get("evaluation", ())
    }
    for name, limit, unit in (
        ("evaluate", "eval_nsamples", "windows"),
        ("tasks", "limit", "documents"),
    ):
        if s[name]:
            first = (
                f", the first {s[limit]} {unit}"
                if s[limit] and not (texts and name == "evaluate")
                else ""
            )
            named = [f"{one}{texts.get(one, '')}" for one in s[name]]
            words.append(f"measured on {', '.join(named)}{first}")
    return "; ".join([*words, f"seed {s['seed']}."])
