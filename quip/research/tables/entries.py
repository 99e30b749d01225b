"""The numbers of a table: ours beside the paper's, with what is missed, failed or not run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quip.research.tables.cells import Cell, Settings, cell_of
from quip.research.tables.description import Line, Measure, Table, papers_name
from quip.research.tables.paper import lookup

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
    state: str  # done, missed, failed, not run
    seconds: float | None = None  # of the whole cell
    bits_per_weight: float | None = None


def entries(
    table: Table, models: Sequence[str], settings: Settings, root: Path
) -> tuple[Entry, ...]:
    """Every number of the table, as far as its cells have been run."""
    return tuple(
        _entry(table, model, row, column, measure, settings, root)
        for model in models
        for row in table.rows
        for column in table.columns
        for measure in table.measures
    )


def _entry(
    table: Table,
    model: str,
    row: Line,
    column: Line,
    measure: Measure,
    settings: Settings,
    root: Path,
) -> Entry:
    def cell(line: Line) -> Cell:
        return cell_of(table, model, line, column, settings, root)

    involved = [cell(table.find(label)) for label in row.minus] if row.minus else [cell(row)]
    reports = [one.report() for one in involved]
    values = [measure.of(report) for report in reports]
    ours = None
    if None not in values:
        ours = values[0] - values[1] if row.minus else values[0]  # type: ignore[operator]
    words = {"metric": measure.label, **table.paper, **column.paper, **row.paper}
    papers = lookup({**words, "model": papers_name(model) or ""})
    totals = reports[0].get("totals") or {}
    return Entry(
        model=model,
        row=row.label,
        column=column.label,
        measure=measure.label,
        ours=ours,
        paper=papers,
        state=_state(
            ours, papers, measure, failed=any(r.get("status") == "failed" for r in reports)
        )
        if not row.minus
        else ("not run" if ours is None else "done"),
        seconds=sum(reports[0].get("seconds", {}).values()) or None,
        bits_per_weight=None if row.minus else totals.get("bits_per_weight"),
    )


def _state(ours: float | None, papers: float | None, measure: Measure, *, failed: bool) -> str:
    if ours is None:
        return "failed" if failed else "not run"
    if papers is None or measure.better == "neither":
        return "done"
    worse = (papers - ours if measure.better == "higher" else ours - papers) / abs(papers)
    return "missed" if worse > TOLERANCE else "done"
