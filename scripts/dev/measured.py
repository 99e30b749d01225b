"""Every perplexity in results/, as points: model, method, bits as stored, what it is above 16 bits.

A point is taken from the first record that has it: those of `quip table perplexity`, then those of
`sharp`, `gptvq`, `trellis` and `frontier`. Each is set beside the original on the same text.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "results"
MODELS = {"demo": "demo", "smollm2": "SmolLM2-135M-Instruct"}  # by the names of their records

METHODS = {
    "OPTQ": "gptq",
    "LDLQ": "ldlq",
    "LDLQ-RG": "ldlqRG",
    "QuIP": "ldlq",
    "QuIP-RG": "ldlqRG",
    "Greedy": "allbal",
    "Algorithm 5": "ldlbal_admm",
    "Near": "nearest",
}
SHARP_ROWS = {
    "": ("lattice", "ldlq"),
    ", (a)": ("fine-tuned", "a"),
    ", (b)": ("fine-tuned", "b"),
    ", (a) and (b)": ("fine-tuned", "ab"),
}
WALKS = {  # rows of `quip table trellis` and `quip table frontier`
    "learned, 2^12 states": ("trellis", "walk"),
    "the best": ("felt", "walk"),
    "the best, (b)": ("felt", "b"),
}
LEARNED = re.compile(r"([\d.]+) bits: ([124]D)")  # rows of `quip table gptvq` that are ours


@dataclass(frozen=True)
class Point:
    """One model quantized in one way."""

    model: str  # its name in MODELS
    processing: str
    method: str
    bits: float  # nominal
    stored: float | None  # bits per weight with all that a file needs; None: not recorded
    perplexity: float
    original: float  # the perplexity of the original on the same tokens

    @property
    def excess(self) -> float:
        """Perplexity above the original's, as a share of it."""
        return self.perplexity / self.original - 1


def points(*, tables: bool = True) -> list[Point]:
    """All of them, the nominal bits of a method in descending order.

    Without `tables` those that were measured on the same tokens as the lattices.
    """
    found: dict[tuple[str, str, str, float], Point] = {}
    for model in MODELS:
        tabled = (f"{name}_{model}" for name in ("sharp", "gptvq", "trellis", "frontier"))
        names = (f"table_perplexity_{model}", model, *tabled)
        for record in filter(None, map(load, names if tables else names[1:])):
            for p in _points(model, record):
                found.setdefault((p.model, p.processing, p.method, p.bits), p)
    return [found[key] for key in sorted(found, key=lambda key: (*key[:3], -key[3]))]


def digest() -> str:
    """Of everything that docs/perplexity.svg depends on: the points and the code that draws it."""
    code = Path(__file__).with_name("draw_perplexity.py").read_text()
    return hashlib.sha256((repr([astuple(p) for p in points()]) + code).encode()).hexdigest()[:16]


def load(name: str) -> dict[str, Any] | None:
    """A record, or None where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def numbers(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of a table of one column: row -> measure -> the number, where there is one."""
    found: dict[str, dict[str, float]] = {}
    for e in record["entries"]:
        if e["ours"] is not None:
            found.setdefault(e["row"], {})[e["measure"]] = float(e["ours"])
    return found


def _points(model: str, record: Mapping[str, Any]) -> Iterator[Point]:
    entries = [
        e
        for e in record["entries"]
        if e["ours"] is not None and record["axes"][e["measure"]].startswith("perplexity")
    ]
    original = next(float(e["ours"]) for e in entries if e["row"] == "original")
    for e in entries:
        if how := _how(e["row"], e["column"]):
            yield Point(model, *how, e["bits_per_weight"], float(e["ours"]), original)


def _how(row: str, column: str) -> tuple[str, str, float] | None:
    """Processing, method and bits by the labels of a cell; None for what is not drawn."""
    if learned := LEARNED.fullmatch(row):
        return "learned", learned[2], float(learned[1])
    if row.partition(": ")[2] in WALKS:
        return *WALKS[row.partition(": ")[2]], float(row.split()[0])
    if row.partition(": ")[2].startswith("E8P"):
        variant = row.partition(", Hadamard")[2] if ", Hadamard" in row else None
        return (*SHARP_ROWS[variant], int(row.split()[0])) if variant in SHARP_ROWS else None
    name = row.removesuffix(" as printed").removesuffix(" + IncP")
    if name not in METHODS:
        return None
    printed, processed = row.endswith("as printed"), "IncP" in row or "QuIP" in row
    processing = "as printed" if printed else "incoherence" if processed else "baseline"
    return processing, METHODS[name], int(column.split()[0])
