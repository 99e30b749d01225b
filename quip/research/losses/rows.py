"""The losses that a bench measured: rows of a file, their means, and tables of both."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

from quip.codebooks.names import INTEGERS
from quip.matrix.said import number
from quip.model.records import MatrixRecord
from quip.packed.files import naming_damage
from quip.reading import read_text

ANEW = "start anew with --overwrite"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to quantize, among those that are compared."""

    quant: str
    codebook: str
    wbits: int | float
    processing: str  # baseline or incoherence

    def __str__(self) -> str:
        named = "" if self.codebook == INTEGERS else f", {self.codebook}"
        return f"{self.quant}, {self.wbits} bits, {self.processing}{named}"

    @property
    def method(self) -> str:
        """What is compared: the rounding, and the codebook if it is no grid."""
        return self.quant if self.codebook == INTEGERS else f"{self.quant}, {self.codebook}"


@dataclass(frozen=True, kw_only=True)
class LossRow(MatrixRecord):
    """What one matrix loses in one case; `seconds` without what was shared with a case before."""

    quant: str
    codebook: str
    wbits: int | float
    processing: str
    absolute_loss: float  # tr(E H E^T), original basis, undamped H
    rho: float | None  # the range of grid b; None: fitted, or of no such grid

    @property
    def case(self) -> Case:
        return Case(
            quant=self.quant,
            codebook=self.codebook,
            wbits=self.wbits,
            processing=self.processing,
        )


def read_losses(path: Path) -> list[LossRow]:
    """The rows of a file that `write_csv` wrote; none where there is no file.

    Raises Unavailable for one that is damaged.
    """
    if not path.exists():
        return []
    with naming_damage(f"{path} is damaged", ANEW):
        try:
            return [_loss(row) for row in csv.DictReader(StringIO(read_text(path)), strict=True)]
        except (csv.Error, TypeError, KeyError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(reason) from error


def _loss(row: Mapping[str, str]) -> LossRow:
    known: dict[str, Any] = {}
    for field in fields(LossRow):
        if field.name == "tokens":  # which older files do not have
            continue
        text = row[field.name]
        if field.type in (int, float, str):
            known[field.name] = field.type(text)
        elif field.name == "wbits":
            known[field.name] = number(text)
        else:
            known[field.name] = float(text) if text else None
    return LossRow(**known)


def by_case(losses: Iterable[LossRow]) -> dict[Case, list[LossRow]]:
    """The losses of each case, in the order in which cases are met."""
    found: dict[Case, list[LossRow]] = {}
    for loss in losses:
        found.setdefault(loss.case, []).append(loss)
    return found


def geometric_mean(losses: Sequence[LossRow]) -> float:
    """The geometric mean of the relative losses; 0 if one of them is."""
    values = [loss.proxy_loss for loss in losses]
    return 0.0 if min(values) <= 0 else math.exp(fmean(map(math.log, values)))


def summarised(losses: Sequence[LossRow]) -> list[dict[str, object]]:
    """A line for each case: the mean, geometric mean and total over its matrices."""
    lines = []
    for case, rows in by_case(losses).items():
        sizes = [row.rows * row.columns for row in rows]
        stored = sum(row.bits_per_weight * n for row, n in zip(rows, sizes, strict=True))
        lines.append(
            {
                **vars(case),
                "matrices": len(rows),
                "mean_proxy_loss": fmean(row.proxy_loss for row in rows),
                "geometric_mean_proxy_loss": geometric_mean(rows),
                "total_proxy_loss": sum(row.proxy_loss for row in rows),
                "mean_absolute_loss": fmean(row.absolute_loss for row in rows),
                "total_absolute_loss": sum(row.absolute_loss for row in rows),
                "bits_per_weight": stored / sum(sizes),
                "seconds": sum(row.seconds for row in rows),
            }
        )
    return lines


def method_tables(
    losses: Sequence[LossRow], measure: str, title: str
) -> list[list[tuple[str, ...]]]:
    """For each processing a table of `measure` of `summarised`: methods down, bits across."""
    lines = summarised(losses)
    tables = []
    for processing in dict.fromkeys(case.processing for case in by_case(losses)):
        cells = {
            (_case(line).method, _case(line).wbits): f"{line[measure]:.4g}"
            for line in lines
            if line["processing"] == processing
        }
        bits = sorted({b for _, b in cells}, reverse=True)
        rows = [(f"{title}, {processing}", *(f"{b} bits" for b in bits))]
        for method in dict.fromkeys(name for name, _ in cells):
            rows.append((method, *(cells.get((method, b), "-") for b in bits)))
        tables.append(rows)
    return tables


def _case(line: Mapping[str, Any]) -> Case:
    return Case(**{field.name: line[field.name] for field in fields(Case)})
