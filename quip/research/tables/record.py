"""A table as it stands: every number, and what it depends on, fit for JSON and for a repository."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quip.files import replacing, write_csv, writing
from quip.jobs.report.folder import as_json
from quip.jobs.report.plots import can_plot
from quip.research.tables.cells import Cell, Settings, cells, identity
from quip.research.tables.description import Table
from quip.research.tables.drawing import plot_table
from quip.research.tables.entries import entries
from quip.research.tables.rendering import markdown


def record_of(
    table: Table, models: Sequence[str], settings: Settings, root: Path
) -> dict[str, Any]:
    """Everything that is known of the table; no name in it is a path of this machine."""
    found = [asdict(entry) for entry in entries(table, models, settings, root)]
    return {
        "table": table.name,
        "title": table.title,
        "source": table.source,
        "note": table.note,
        "by": table.by,
        "axes": {measure.label: measure.axis for measure in table.measures},
        "settings": {
            "dataset": _public(settings.dataset),
            "nsamples": settings.nsamples,
            "seqlen": settings.seqlen,
            "evaluate": [_public(name) for name in settings.evaluate],
            "eval_nsamples": settings.eval_nsamples,
            "tasks": list(settings.tasks),
            "limit": settings.limit,
            "seed": settings.seed,
            "dtype": settings.dtype,
        },
        "versions": _versions(cells(table, models, settings, root)),
        "entries": [{**entry, "model": _public(entry["model"])} for entry in found],
    }


def write_record(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """NAME.json, .csv and .md, and .png where matplotlib is installed and a number is known."""
    *paths, picture = [
        folder / f"{record['table']}.{kind}" for kind in ("json", "csv", "md", "png")
    ]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        picture.unlink(missing_ok=True)
    with replacing(paths[0]) as partial:
        partial.write_text(as_json(record))
    write_csv(paths[1], record["entries"])
    with replacing(paths[2]) as partial:
        partial.write_text(markdown(record))
    known = any(e["ours"] is not None or e["paper"] is not None for e in record["entries"])
    if known and can_plot():
        paths.append(picture)
        plot_table(record, picture)
    return paths


def _versions(found: Iterable[Cell]) -> dict[str, str]:
    """The versions that the cells were run with; several of a package are all named."""
    seen: dict[str, set[str]] = {}
    for cell in found:
        for package, version in cell.report().get("versions", {}).items():
            seen.setdefault(package, set()).add(version)
    return {package: ", ".join(sorted(several)) for package, several in seen.items()}


def _public(name: str) -> str:
    """A hub id or a known name as it is, a path without its folders."""
    return Path(name).name if len(identity(name)) > 1 else name
