"""The numbers of a table: ours beside the paper's, with what is missed, failed or not run."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quip.research.tables.cells import Settings, cell_of, has_none
from quip.research.tables.description import Line, Table
from quip.research.tables.papers import lookup, papers_name

TOLERANCE = 0.05  # by how much more than this of the paper's number ours must be worse to be missed


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One number of a table."""

    model: str
    row: str
    column: str
    measure: str
    ours: float | None
    paper: float | None
    state: str  # done, missed, failed, not run, none
    seconds: float | None = None  # of the whole cell
    bits_per_weight: float | None = None


def entries(
    table: Table, models: Sequence[str], settings: Settings, root: Path
) -> tuple[Entry, ...]:
    """Every number of the table, as far as its cells have been run."""
    return tuple(
        entry
        for model in models
        for row in table.rows
        for column in table.columns
        for entry in _of_place(table, model, row, column, settings, root)
    )


def _of_place(
    table: Table, model: str, row: Line, column: Line, settings: Settings, root: Path
) -> Iterator[Entry]:
    lines = [row] if row.is_run else [table.find(label) for label in row.parts]
    cells = [cell_of(table, model, line, column, settings, root) for line in lines]
    reports = [cell.report() for cell in cells]
    failed = any(report.get("status") == "failed" for report in reports)
    own = reports[0] if row.is_run else {}
    name = papers_name(model)
    judged = row.is_run and name is not None  # not by the numbers of another model
    for measure in table.measures:
        ours = row.combine([measure.of(report) for report in reports])
        words = {"model": name or table.beside, "metric": measure.label}
        papers = lookup({**words, **table.paper, **column.paper, **row.paper})
        yield Entry(
            model=model,
            row=row.label,
            column=column.label,
            measure=measure.label,
            ours=ours,
            paper=papers,
            state="none"
            if row.published
            or (
                ours is None
                and any(
                    has_none(measure, report) or cell.leaves_out(measure)
                    for cell, report in zip(cells, reports, strict=True)
                )
            )
            else state_of(ours, papers, measure.better if judged else "neither", failed=failed),
            seconds=sum(own.get("seconds", {}).values()) or None,
            bits_per_weight=own.get("totals", {}).get("bits_per_weight"),
        )


def state_of(ours: float | None, papers: float | None, better: str, *, failed: bool) -> str:
    """done, missed, failed or not run; what is `neither` better nor worse is not missed."""
    if ours is None:
        return "failed" if failed else "not run"
    if papers is None or better == "neither" or not math.isfinite(papers):
        return "done"
    worse = papers - ours if better == "higher" else ours - papers
    return "missed" if not math.isfinite(ours) or worse > TOLERANCE * abs(papers) else "done"
