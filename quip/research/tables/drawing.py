"""A table as a plot: lines of rows over columns, or over models; ours solid, the paper's dashed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quip.jobs.report.plots import save_figure
from quip.research.tables.cells import slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {"columns": "column", "models": "model"}  # what runs along -> key of an entry


def plot_table(record: Mapping[str, Any], path: Path) -> None:
    """A panel for each measure and model (or column), as a PNG; numbers that are not known lack."""
    from matplotlib.figure import Figure

    along = AXES[record["by"]]
    other = "model" if along == "column" else "column"
    found = [{**e, "model": slug(e["model"])} for e in record["entries"]]
    found = [e for e in found if e["ours"] is not None or e["paper"] is not None]
    ticks, across, measures = (
        list(dict.fromkeys(e[key] for e in found)) for key in (along, other, "measure")
    )
    colours = {row: f"C{i % 10}" for i, row in enumerate(dict.fromkeys(e["row"] for e in found))}
    size = (3.5 + 3.5 * len(measures), 1 + 3.5 * len(across))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(across), len(measures), squeeze=False)
    for line, value in zip(grid, across, strict=True):
        for axes, measure in zip(line, measures, strict=True):
            here = [e for e in found if e[other] == value and e["measure"] == measure]
            _panel(axes, here, ticks, along, colours)
            axes.set(title=value, ylabel=record["axes"][measure])
    figure.legend(handles=_handles(found, colours), loc="outside right upper", fontsize="small")
    figure.suptitle(record["title"])
    save_figure(figure, path)


def _panel(
    axes: "Axes",
    found: Sequence[Mapping[str, Any]],
    ticks: Sequence[str],
    along: str,
    colours: Mapping[str, str],
) -> None:
    values = []
    for key, style, fill in (("ours", "-", "full"), ("paper", "--", "none")):
        for row, colour in colours.items():
            points = {
                e[along]: float(e[key]) for e in found if e["row"] == row and e[key] is not None
            }
            known = [(i, points[tick]) for i, tick in enumerate(ticks) if tick in points]
            if known:
                axes.plot(
                    *zip(*known, strict=True), style, marker="o", fillstyle=fill, color=colour
                )
                values += [y for _, y in known]
    if values and math.isfinite(max(values)) and min(values) > 0 and max(values) > 2 * min(values):
        _logarithmic(axes, decades=math.log10(max(values) / min(values)))
    axes.set_xticks(range(len(ticks)), ticks, rotation=0 if max(map(len, ticks)) < 9 else 30)
    axes.grid(visible=True, which="both", alpha=0.3)


def _logarithmic(axes: "Axes", *, decades: float) -> None:
    """With ticks that are written out, and some between the powers of ten of a short axis."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    between = LogLocator(subs=(1.5, 2, 3, 5, 7)) if decades < 2 else NullLocator()
    axes.yaxis.set_minor_locator(between)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))


def _handles(found: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker="o", label=row) for row, colour in colours.items()
    ]
    if any(e["paper"] is not None for e in found):
        handles.append(
            Line2D(
                [], [], color="grey", linestyle="--", marker="o", fillstyle="none", label="paper"
            )
        )
    return handles
