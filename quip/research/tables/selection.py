"""The part of a table that is asked for: rows and columns by label, other texts and tasks."""

from collections.abc import Sequence
from dataclasses import replace

from quip.errors import UsageError
from quip.research.tables.cells import EVALUATED, GROWING, Settings
from quip.research.tables.description import Line, Measure, Table, perplexities


def settle(table: Table, settings: Settings) -> Table:
    """The table with the data sets and tasks that the settings name instead of its own."""
    if settings.evaluate == table.evaluate and settings.tasks == table.tasks:
        return table
    gone = GROWING if settings.evaluate else EVALUATED
    has_mean = any(m.path == ("mean_perplexity",) for m in table.measures)  # of whatever is named
    measures = (
        *(m for m in table.measures if m.path[0] not in gone),
        *(() if has_mean else perplexities(settings.evaluate)),
        *(_task(table, name) for name in settings.tasks),
    )
    return replace(table, evaluate=settings.evaluate, tasks=settings.tasks, measures=measures)


def _task(table: Table, name: str) -> Measure:
    known = (m for m in table.measures if m.path[:2] == ("tasks", name))
    new = Measure(label=name, path=("tasks", name, "acc"), scale=100.0, better="higher")
    return next(known, new)


def select(
    table: Table,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Table:
    """The table with these rows and columns only, by label. Raises UsageError for one it has not.

    Rows that a difference or ratio needs stay.
    """
    return replace(
        table,
        rows=_chosen(table, "--rows", table.rows, rows),
        columns=_chosen(table, "--columns", table.columns, columns),
    )


def _chosen(
    table: Table, flag: str, lines: Sequence[Line], wanted: Sequence[str] | None
) -> tuple[Line, ...]:
    if wanted is None:
        return tuple(lines)
    known = {line.label: line for line in lines}
    for label in wanted:
        if label not in known:
            raise UsageError(f"{flag} {label}: {table.name} has {'; '.join(known)}")
    needed = {label for one in wanted for label in (one, *known[one].parts)}
    return tuple(line for line in lines if line.label in needed)
