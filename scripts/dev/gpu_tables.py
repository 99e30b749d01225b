"""Tables of results/gpu.json: what scripts/bench_gpu.py has measured on a CUDA device."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def of_gpu(record: Mapping[str, Any]) -> str:
    """A table for each section, with the commit that it was measured at."""
    versions = record["versions"]
    lines = [f"{record['device']}, torch {versions['torch']}, CUDA {versions['cuda']}."]
    for name, section in record["sections"].items():
        rows = [row for row in section["rows"] if "shape" in row]
        lines += ["", *SECTIONS[name](rows), "", f"{_ending(rows)} {_origin(section)}"]
    return "\n".join(lines) + "\n"


def panel(rows: Sequence[Row]) -> list[str]:
    """The sweep of a matrix by the kernel and by torch."""
    spans = " / ".join(rows[0]["ms"])
    lines = [
        f"Rounding a matrix, by spans of {spans} columns:",
        "",
        "| m x n | code | range | ms | torch, ms | target, ms | codes that differ | loss ratio |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ms = " / ".join(f"{x:.1f}" for x in row["ms"].values())
        passes = f", {row['passes']} passes" if row.get("passes") else ""
        differ = "-" if row.get("differ") is None else f"{100 * row['differ']:.2g}%"
        lines.append(
            f"| {_size(row['shape'])} | {row.get('code') or 'int {bits}'.format(**row)} "
            f"| {row['range']}{passes} | {ms} | {_number(row, 'torch_ms', ',.0f')} "
            f"| {_number(row, 'target_ms', '.0f')} | {differ} "
            f"| {_number(row, 'loss_ratio', '.4f')} |"
        )
    return lines


def _number(row: Row, name: str, form: str) -> str:
    """A dash for what was not measured, or has no target."""
    return "-" if row.get(name) is None else format(row[name], form)


def matvec(rows: Sequence[Row]) -> list[str]:
    """Products with packed codes: of one vector, then of more; and decoding all of a matrix."""
    decoded = [row for row in rows if "decode" in row]
    rows = [row for row in rows if "code" in row]
    halves = [row for row in rows if row["dtype"] == "bfloat16"]
    several = {(row["code"], *row["shape"]) for row in halves if row["tokens"] > 1}
    return [
        "Products of one vector in bfloat16 with packed codes: µs, the share of 3.0 TB/s at which "
        "the codes are read, and how many times as fast as `F.linear` in bfloat16:",
        "",
        *_crossed([r for r in halves if r["tokens"] == 1], lambda row: _size(row["shape"])),
        "",
        "Of more vectors:",
        "",
        *_crossed(
            [r for r in halves if (r["code"], *r["shape"]) in several],
            lambda row: f"{_size(row['shape'])}, {row['tokens']}",
        ),
        "",
        *_decoded(decoded),
        *_checked(rows),
    ]


def _decoded(rows: Sequence[Row]) -> list[str]:
    """How long all of a matrix takes to be decoded, if that was measured."""
    said = [f"{r['decode']} {_size(r['shape'])} {r['us']:.1f} ({r['share']:.0%})" for r in rows]
    return [f"All of a matrix as bfloat16, in µs: {', '.join(said)}.", ""] if rows else []


def _crossed(rows: Sequence[Row], column: Any) -> list[str]:
    """A line a code, a column for each size."""
    cells = {
        (r["code"], column(r)): f"{r['us']:.1f} ({r['share']:.0%}, {r['over_bf16']:.2f})"
        for r in rows
    }
    columns = sorted(dict.fromkeys(map(column, rows)), key=_numbers)
    lines = [f"| codes | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for code in dict.fromkeys(row["code"] for row in rows):
        lines.append(f"| {code} | " + " | ".join(cells[code, c] for c in columns) + " |")
    return lines


def _checked(rows: Sequence[Row]) -> list[str]:
    """How far the products are from those in float64."""
    errors = {
        dtype: max(row["error"] for row in rows if row["dtype"] == dtype)
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    }
    said = " and ".join(f"{error:.1e} in {dtype}" for dtype, error in errors.items())
    equal = sum(row["repeats"] for row in rows)
    return [
        f"The first and last rows of each product are off those in float64 by at most {said}, "
        f"relative to their norm; {equal} of {len(rows)} products were equal bit for bit when "
        "computed again."
    ]


def _ending(rows: Sequence[Row]) -> str:
    """How many targets of speed were reached."""
    reached = [min(r["ms"].values()) <= r["target_ms"] for r in rows if r.get("target_ms")]
    reached += [row["us"] <= row["target_us"] for row in rows if "target_us" in row]
    reached += [row["share"] >= row["target_share"] for row in rows if "target_share" in row]
    return f"Targets of speed reached: {sum(reached)} of {len(reached)}."


def _origin(section: Mapping[str, Any]) -> str:
    """What was run, and whether to its end."""
    tree = (
        f", run before it was committed, noted as {section['noted']}" if "noted" in section else ""
    )
    ended = "" if section["ended"] == "done" else f", {section['ended']}"
    return f"(One run, commit {section['commit']}{tree}{ended}.)"


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _numbers(column: str) -> list[int]:
    return [int(word) for word in column.replace(",", "").split() if word.isdigit()]


SECTIONS = {"panel": panel, "matvec": matvec}
