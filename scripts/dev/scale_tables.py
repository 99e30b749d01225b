"""Tables of results/scale_*.json: what --dry_run foretold, what runs took, and simulations."""

from collections.abc import Mapping
from typing import Any

from quip.jobs.report.forecast import time_words
from quip.jobs.report.text import size_words

Record = Mapping[str, Any]


def of_forecasts(record: Record) -> str:
    """What was foretold of runs beside what they took."""
    runs = record["runs"]
    lines = [
        "| | " + " | ".join(f"{run['name']}: foretold | took" for run in runs) + " |",
        "|---|" + "---:|---:|" * len(runs),
    ]
    for stage in dict.fromkeys(stage for run in runs for stage in run["seconds"]):
        pairs = (map(time_words, run["seconds"][stage]) for run in runs)
        lines.append(f"| {stage} | {' | '.join(' | '.join(pair) for pair in pairs)} |")
    for what in ("host", "checkpoint", "ledger"):
        pairs = (map(size_words, run["bytes"][what]) for run in runs)
        lines.append(f"| {what} | {' | '.join(' | '.join(pair) for pair in pairs)} |")
    pairs = (f"{run['bits'][0]:.4f} | {run['bits'][1]:.4f}" for run in runs)
    lines.append(f"| bits per weight | {' | '.join(pairs)} |")
    return "\n".join([*lines, "", f"{record['where']}."]) + "\n"


def of_forecast(record: Record) -> str:
    """Memory and disk of one process, foretold of a model that nobody has loaded here."""
    rows = [way for way in record["ways"] if way["ranks"] == 1]
    whole, streamed = sorted(rows, key=lambda way: way["streamed"])
    lines = ["| host memory | held in memory | streamed |", "|---|---:|---:|"]
    for stage, count in whole["host_bytes"].items():
        other = streamed["host_bytes"].get(stage)
        words = "-" if other is None else size_words(other)
        lines.append(f"| {stage} | {size_words(count)} | {words} |")
    disk = ", ".join(f"{name} {size_words(count)}" for name, count in record["disk_bytes"].items())
    return "\n".join([*lines, "", f"On the disk: {disk}; {record['line']}."]) + "\n"


def of_simulations(record: Record) -> str:
    """What a few blocks took, and what all come to."""
    lines = [
        "| model | width | blocks | of | memory beside torch | read | written | a block | all |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['model']} | {row['config']['hidden_size']} "
            f"| {row['config']['num_hidden_layers']} | {size_words(row['block_bytes'])} "
            f"| {size_words(row['anonymous_bytes'] - row['runtime_bytes'])} "
            f"| {size_words(row['read_bytes'])} | {size_words(row['written_bytes'])} "
            f"| {time_words(row['seconds_per_block'])} "
            f"| {time_words(row['extrapolated_seconds'])} |"
        )
    held = [row for row in record["rows"] if "in_memory" in row]
    if held:
        lines += [
            "",
            "| beside the model in memory | blocks | memory beside torch | in memory | time "
            "| in memory | saved |",
            "|---|---:|---:|---:|---:|---:|---|",
        ]
    for row in held:
        other, runtime = row["in_memory"], row["runtime_bytes"]
        lines.append(
            f"| {row['model']} | {row['config']['num_hidden_layers']} "
            f"| {size_words(row['anonymous_bytes'] - runtime)} "
            f"| {size_words(other['anonymous_bytes'] - runtime)} "
            f"| {time_words(row['wall_seconds'])} | {time_words(other['wall_seconds'])} "
            f"| {'equal bit for bit' if other['equal'] else 'NOT equal'} |"
        )
    return "\n".join([*lines, "", f"{record['where']}."]) + "\n"
