"""What the papers print: published cells by model, method, processing, bits and metric."""

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "published"
FILES = ("cells.csv", "gptvq.csv", "qtip.csv")
SUSPECT = "SUSPECT"  # cells that the paper prints by mistake
KEYS = ("model", "processing", "method", "wbits", "metric")


@cache
def published() -> Mapping[tuple[str, ...], float]:
    """(model, processing, method, wbits, metric) -> the printed number: of QuIP, GPTVQ, QTIP.

    Where a table prints by mistake another model's numbers, those read off a figure count.
    """
    rows = []
    for name in FILES:
        with (FOLDER / name).open(newline="") as file:
            found = csv.DictReader(file)
            rows += [row for row in found if not row["note"].startswith(SUSPECT)]
    cells = {tuple(row[key] for key in KEYS): float(row["value"]) for row in rows}
    assert len(cells) == len(rows), "a cell stands twice"
    return cells


def lookup(words: Mapping[str, str]) -> float | None:
    """The published cell that these words find, if there is one."""
    return published().get(tuple(words.get(key, "") for key in KEYS))


@cache
def known_models() -> Mapping[str, Mapping[str, Any]]:
    """Models of the papers: hub id -> what papers call it, and its config."""
    return yaml.safe_load((FOLDER / "models.yaml").read_text())


def papers_name(model: str) -> str | None:
    """What papers call the model of a hub id."""
    return known_models().get(model, {}).get("paper")
