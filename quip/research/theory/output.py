"""The folder that a measurement leaves: rows for programs and pictures for people."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quip.files import new_folder, write_csv
from quip.jobs.report.folder import as_json
from quip.jobs.report.plots import can_plot


def write_results(
    folder: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    plots: Mapping[str, Callable[[Path], None]],
    overwrite: bool,
) -> None:
    """NAME.csv and NAME.json, and each plot by its file's name where matplotlib is installed."""
    with new_folder(folder, overwrite=overwrite) as partial:
        write_csv(partial / f"{name}.csv", rows)
        (partial / f"{name}.json").write_text(as_json({**settings, "rows": rows}))
        for file, plot in plots.items() if can_plot() else ():
            plot(partial / file)
