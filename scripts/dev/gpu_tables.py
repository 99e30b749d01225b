"""Tables of results/gpu.json: what scripts/bench_gpu.py has measured on a CUDA device."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def of_gpu(record: Mapping[str, Any]) -> str:
    """A table for each section, with the commit that it was measured at."""
    versions = record["versions"]
    lines = [f"{record['device']}, torch {versions['torch']}, CUDA {versions['cuda']}."]
    for name, section in record["sections"].items():
        table = SECTIONS.get(name, plain)(_tabled(section["rows"]))
        lines += ["", *table, "", f"{_ending(section['rows'])} {_origin(section)}".lstrip()]
    return "\n".join(lines) + "\n"


def _tabled(rows: Sequence[Row]) -> list[Row]:
    """Of shapes, where there are such rows; else all but the seconds of a compiler."""
    shaped = [row for row in rows if "shape" in row]
    return shaped or [row for row in rows if "compile_s" not in row]


def forms(rows: Sequence[Row]) -> list[str]:
    """Which kernels computed what their references do."""
    wrong = [row for row in rows if not row["right"]]
    lines = [
        f"Of {len(rows)} kernels on the device {len(rows) - len(wrong)} computed what their "
        f"references do, in {sum(row['cases'] for row in rows)} cases."
    ]
    return lines + [f"`{row['form']}`: {row['said']}." for row in wrong]


def hessian(rows: Sequence[Row]) -> list[str]:
    """Second moments and factorisations."""
    lines = [
        "Second moments of 8192 tokens, TFLOP/s of 2 tokens n², and what is made of them:",
        "",
        "| what | n | ms | TFLOP/s | target | error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (row.get("tflops"), row.get("target_tflops"), row.get("error"))
        words = " | ".join("-" if x is None else f"{x:,g}" for x in cells)
        lines.append(f"| {row['what']} | {row['n']} | {row['ms']:.2f} | {words} |")
    return lines


def block(rows: Sequence[Row]) -> list[str]:
    """The stages of a block, and what 32 of them come to."""
    lines = [
        "A block of Llama-2-7B's shape on 128 windows of 2048 tokens, seconds:",
        "",
        "| recipe | observe | quantize | replay | a block | target | 32 blocks |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "recipe" in row:
            cells = (row[key] for key in ("observe", "quantize", "replay", "block", "target_block"))
            words = " | ".join(f"{x:.2f}" for x in cells)
            lines.append(f"| {row['recipe']} | {words} | {row['model_s']:.0f} |")
    return lines


def decode(rows: Sequence[Row]) -> list[str]:
    """Steps of decoding, carried forward to 32 blocks."""
    lines = [
        "Decoding with blocks of Llama-2-7B's shape, one CUDA graph a step, carried forward from 4 "
        "to 32 blocks:",
        "",
        "| codes | texts | a block, µs | tokens/s | times bfloat16 | target |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = f"{row['block_us']:.1f} | {row['tokens_per_s']:,.0f} | {row['over_bf16']:.2f}"
        target = row["target_over_bf16"] or "-"
        lines.append(f"| {row['code']} | {row['texts']} | {cells} | {target} |")
    return lines


def model(rows: Sequence[Row]) -> list[str]:
    """Perplexities on the device and on the CPU, and runs that were taken up."""
    lines = [
        "Perplexity of models quantized and measured on the CPU, and on the device:",
        "",
        "| model | recipe | CPU | device | apart |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        if "apart" in row:
            there = row.get("cuda", row["cpu"])
            lines.append(
                f"| {row['model']} | {row['recipe']} | {row['cpu']:.2f} | {there:.2f} "
                f"| {row['apart']:.2%} |"
            )
    taken = [row["taken_up_is_bitwise_equal"] for row in rows if "taken_up_is_bitwise_equal" in row]
    said = f"Runs that were taken up after a block and came out bit for bit: {sum(taken)} of "
    return [*lines, "", f"{said}{len(taken)}."]


def plain(rows: Sequence[Row]) -> list[str]:
    """All that rows say, of a section that has no table of its own."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    return lines + [f"| {' | '.join(str(row.get(key, '-')) for key in keys)} |" for row in rows]


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


def rotations(rows: Sequence[Row]) -> list[str]:
    """Those of one vector, of more, and of weights; then what a layer takes."""
    lines = [
        "Rotations from bfloat16 to float32, signs included; the rows and columns of weights in "
        "float32. The share is that of 3.0 TB/s at which many numbers are read and written once:",
        "",
        "| rotation | width | vectors | µs | torch, µs | share | error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in (row for row in rows if "rotation" in row):
        share = f"{r['share']:.0%}" if "share" in r else "-"
        lines.append(
            f"| {r['rotation']} | {r['width']} | {r['vectors']} | {r['us']:.1f} "
            f"| {r['torch_us']:.1f} | {share} | {r['error']:.1e} |"
        )
    layers = [f"{r['us']:.1f} µs ({r['layer']})" for r in rows if "layer" in r]
    return [*lines, "", f"All rotations of a 7B layer, one token: {', '.join(layers)}."]


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
    for key, sign in (("tflops", 1), ("over_bf16", 1), ("block", -1)):
        aimed = [(row[key], row.get(f"target_{key}")) for row in rows if key in row]
        reached += [sign * found >= sign * target for found, target in aimed if target]
    return f"Targets of speed reached: {sum(reached)} of {len(reached)}." if reached else ""


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


SECTIONS = {
    "forms": forms,
    "model": model,
    "panel": panel,
    "hessian": hessian,
    "matvec": matvec,
    "rotations": rotations,
    "block": block,
    "decode": decode,
}
