"""A table as it stands: every number, and what it depends on, fit for JSON and for a repository."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quip.files import make_folder, replacing, write_csv, writing
from quip.jobs.report.folder import as_json
from quip.jobs.report.plots import can_plot
from quip.research.tables.cells import Settings, cells, identity
from quip.research.tables.description import Table
from quip.research.tables.drawing import plot_table
from quip.research.tables.entries import entries
from quip.research.tables.rendering import markdown

MACHINE = ("device", "dtype", "threads")  # entries of a cell's report


def record_of(
    table: Table, models: Sequence[str], settings: Settings, root: Path
) -> dict[str, Any]:
    """Everything that is known of the table; no name in it is a path of this machine."""
    found = [asdict(entry) for entry in entries(table, models, settings, root)]
    reports = [cell.report() for cell in cells(table, models, settings, root)]
    return {
        "kind": "table",
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
        "calibration": _stamps([report.get("calibration")] for report in reports),
        "evaluation": _stamps((report.get("evaluation") or {}).values() for report in reports),
        **{key: _several(report.get(key) for report in reports) for key in MACHINE},
        "versions": _versions(reports),
        "seconds": sum(sum(report.get("seconds", {}).values()) for report in reports),
        "entries": [{**entry, "model": _public(entry["model"])} for entry in found],
    }


def write_record(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """NAME.json, .csv and .md, and .png where matplotlib is installed and a number is known."""
    *paths, picture = [
        folder / f"{record['table']}.{kind}" for kind in ("json", "csv", "md", "png")
    ]
    with writing(folder):
        make_folder(folder)
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


def _versions(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The versions that the cells were run with; several of a package are all named."""
    found = [report.get("versions", {}) for report in reports]
    packages = dict.fromkeys(package for versions in found for package in versions)
    return {package: _several(v.get(package) for v in found) for package in packages}


def _several(values: Iterable[Any]) -> Any:
    """What the cells have in common, None if that is nothing; different values all in one line."""
    known = sorted({value for value in values if value is not None}, key=str)
    return ", ".join(map(str, known)) if len(known) > 1 else next(iter(known), None)


def _stamps(found: Iterable[Iterable[Mapping[str, Any] | None]]) -> list[dict[str, Any]]:
    """The texts that cells were calibrated or measured on, each once, with windows and hash."""
    different: list[dict[str, Any]] = []
    for stamp in (stamp for stamps in found for stamp in stamps if stamp):
        public = {**stamp, "dataset": _public(stamp["dataset"])}
        if public not in different:
            different.append(public)
    return different


def _public(name: str) -> str:
    """A hub id or a known name as it is, a path without its folders."""
    return Path(name).name if len(identity(name)) > 1 else name
