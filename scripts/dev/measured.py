"""Every perplexity in results/, as points: model, method, bits as stored, what it is above 16 bits.

A point is taken from the first record that has it: those of `quip table perplexity`, then those
that measure one method or recipe a row. Each is set beside the original on the same text.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "results"
MODELS = {"demo": "demo", "smollm2": "SmolLM2-135M-Instruct"}  # by the names of their records

# What rows are called in the records: processing, method.
TABLE_ROWS = {
    "OPTQ": ("baseline", "gptq"),
    "LDLQ-RG": ("baseline", "ldlqRG"),
    "Greedy": ("baseline", "allbal"),
    "Near": ("baseline", "nearest"),
    "QuIP": ("incoherence", "ldlq"),
    "QuIP as printed": ("as printed", "ldlq"),
    "QuIP-RG": ("incoherence", "ldlqRG"),
    "Greedy + IncP": ("incoherence", "allbal"),
    "Near + IncP": ("incoherence", "nearest"),
}
SHARP_ROWS = {
    "": ("lattice", "ldlq"),
    ", (a)": ("fine-tuned", "a"),
    ", (b)": ("fine-tuned", "b"),
    ", (a) and (b)": ("fine-tuned", "ab"),
}


@dataclass(frozen=True)
class Point:
    """One model quantized in one way."""

    model: str  # its name in MODELS
    processing: str
    method: str
    bits: int  # nominal
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
    found: dict[tuple[str, str, str, int], Point] = {}
    for model in MODELS:
        for read, name in (
            (_of_table, f"table_perplexity_{model}"),
            (_of_methods, model),
            (_of_recipes, f"sharp_{model}"),
        ):
            record = load(name) if tables or read is not _of_table else None
            if record:
                for p in read(model, record):
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


def _of_table(model: str, record: dict[str, Any]) -> Iterator[Point]:
    entries = [e for e in record["entries"] if e["ours"] is not None]
    original = next(e["ours"] for e in entries if e["row"] == "original")
    for e in entries:
        if e["row"] in TABLE_ROWS:
            bits, stored = int(e["column"].split()[0]), e["bits_per_weight"]
            yield Point(model, *TABLE_ROWS[e["row"]], bits, stored, e["ours"], original)


def _of_methods(model: str, record: dict[str, Any]) -> Iterator[Point]:
    original = next(_perplexity(row) for row in record["rows"] if row["quant"] == "none")
    for row in record["rows"]:
        if row["processing"] in ("baseline", "incoherence", "as printed"):
            how = (row["processing"], row["quant"], row["wbits"], row["bits_per_weight"])
            yield Point(model, *how, _perplexity(row), original)


def _of_recipes(model: str, record: dict[str, Any]) -> Iterator[Point]:
    original = next(_perplexity(row) for row in record["rows"] if row["bits"] == 16)
    for row in record["rows"]:
        codebook, _, variant = row["name"].partition(", Hadamard")
        if codebook.startswith("E8P") and variant in SHARP_ROWS:
            how = (*SHARP_ROWS[variant], row["bits"], row.get("bits_per_weight"))
            yield Point(model, *how, _perplexity(row), original)


def _perplexity(row: dict[str, Any]) -> float:
    return next(iter(row["perplexity"].values()))
