"""What a run will need, in a few lines for a person."""

from collections.abc import Mapping
from typing import Any

from quip.jobs.report.text import size_words

MINUTE = 60
DAY = 24 * 60  # minutes


def forecast_words(found: Mapping[str, Any]) -> str:
    """A table of what `foretell` found: a column for each way to run it."""
    bits = found["bits_per_weight"]
    lines = [
        f"{found['model']} on {found['device']} in {found['dtype']}: {found['matrices']} matrices "
        f"of {found['weights']:,} weights, {found['weights_kept']:,} more that stay",
    ]
    if bits:
        lines.append(f"{bits:.3f} bits per weight")
    disk = ", ".join(f"{name} {size_words(count)}" for name, count in found["disk_bytes"].items())
    lines.append(f"on the disk: {disk or 'nothing'}")
    share = (
        f"{size_words(found['model_bytes'])}, of {size_words(found['free_bytes'])} that are free"
    )
    chosen = "streams the model" if found["streams"] else "holds the model in memory"
    return "\n".join([*lines, f"this run {chosen} ({share})", "", *_table(found["ways"])])


def _table(ways: list[Mapping[str, Any]]) -> list[str]:
    heads = [
        ("", *("streamed" if way["streamed"] else "in memory" for way in ways)),
        ("processes", *(str(way["ranks"]) for way in ways)),
    ]
    stages = [
        (stage, *(time_words(way["seconds"][stage]) for way in ways))
        for stage in ways[0]["seconds"]
    ]
    total = ("in all", *(time_words(way["total_seconds"]) for way in ways))
    host = ("host memory", *(size_words(max(way["host_bytes"].values())) for way in ways))
    rows = [*heads, *stages, total, host]
    if ways[0]["device_bytes"]:
        rows.append(("device memory", *(size_words(way["device_bytes"]) for way in ways)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def time_words(seconds: float) -> str:
    """A time for a person: 12.3 s, 4.5 min, 7 h, 3 days."""
    minutes = seconds / MINUTE
    if minutes < 2:
        return f"{seconds:.1f} s"
    if minutes < 100:
        return f"{minutes:.1f} min"
    return f"{minutes / 60:.1f} h" if minutes < 4 * DAY else f"{minutes / DAY:.0f} days"
