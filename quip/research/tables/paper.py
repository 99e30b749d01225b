"""What the papers print: published cells by model, method, processing, bits and metric."""

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "published.csv"
SUSPECT = "SUSPECT"  # cells that the paper prints by mistake
KEYS = ("model", "processing", "method", "wbits", "metric")


@cache
def published() -> Mapping[tuple[str, ...], float]:
    """(model, processing, method, wbits, metric) -> the printed number.

    Where a table prints by mistake another model's numbers, those read off a figure count.
    """
    with FILE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["note"].startswith(SUSPECT)]
    found = {tuple(row[key] for key in KEYS): float(row["value"]) for row in rows}
    assert len(found) == len(rows), "a cell stands twice"
    return found


def lookup(words: Mapping[str, str]) -> float | None:
    """The published cell that these words find, if there is one."""
    return published().get(tuple(words.get(key, "") for key in KEYS))
