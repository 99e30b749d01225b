"""Plots of what a bench of proxy losses measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quip.jobs.report.plots import can_plot, save_figure
from quip.research.losses.rows import Case, LossRow, by_case, geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL = "tr(E H E$^T$) / tr(W H W$^T$), geometric mean"
MARKERS = "osD^vPX*"


def write_plots(losses: Sequence[LossRow], folder: Path) -> None:
    """depth.png and methods.png in the folder, where matplotlib is installed."""
    if losses and can_plot():
        plot_depth(losses, folder / "depth.png")
        plot_methods(losses, folder / "methods.png")


def plot_depth(losses: Sequence[LossRow], path: Path) -> None:
    """Proxy loss along depth, a line a method; bits across, processing down."""
    from matplotlib.figure import Figure

    cases = by_case(losses)
    across = sorted({case.wbits for case in cases})
    down = list(dict.fromkeys(case.processing for case in cases))
    methods = list(dict.fromkeys(case.method for case in cases))
    width, height = max(8.0, 1.5 + 3.2 * len(across)), max(4.5, 1 + 3 * len(down))
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(down), len(across), sharex=True, sharey=True, squeeze=False)
    for axes, processing in zip(grid, down, strict=True):
        for panel, bits in zip(axes, across, strict=True):
            panel.set_title(f"{bits} bits, {processing}", fontsize="medium")
            for case, rows in cases.items():
                if (case.processing, case.wbits) == (processing, bits):
                    _line(panel, rows, case, methods)
    for panel in grid[-1]:
        panel.set_xlabel("block")
    figure.supylabel(f"relative proxy loss of a block's matrices\n{LABEL}", fontsize="medium")
    named = {line.get_label(): line for panel in grid.flat for line in panel.lines}
    figure.legend(
        [named[method] for method in methods], methods, fontsize="small", loc="outside right upper"
    )
    save_figure(figure, path)


def _line(axes: "Axes", rows: Sequence[LossRow], case: Case, methods: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    blocks: dict[int, list[LossRow]] = {}
    for row in rows:
        blocks.setdefault(row.block, []).append(row)
    place = methods.index(case.method)
    axes.plot(
        sorted(blocks),
        [geometric_mean(blocks[block]) for block in sorted(blocks)],
        marker=MARKERS[place % len(MARKERS)],
        markersize=4,
        color=f"C{place % 10}",
        label=case.method,
    )
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, which="both", alpha=0.3)


def plot_methods(losses: Sequence[LossRow], path: Path) -> None:
    """The mean over all matrices: methods across, a colour each width, filled if processed."""
    from matplotlib.figure import Figure

    cases = by_case(losses)
    methods = list(dict.fromkeys(case.method for case in cases))
    figure = Figure(figsize=(max(8.0, 2 + 0.9 * len(methods)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    series: dict[tuple[int | float, str], dict[str, float]] = {}
    for case, rows in cases.items():
        series.setdefault((case.wbits, case.processing), {})[case.method] = geometric_mean(rows)
    widths = sorted({bits for bits, _ in series})
    for (bits, processing), points in sorted(series.items()):
        colour = f"C{widths.index(bits)}"
        axes.plot(
            [methods.index(method) for method in points],
            list(points.values()),
            linestyle="none",
            marker="s" if processing == "baseline" else "o",
            color=colour,
            markerfacecolor="none" if processing == "baseline" else colour,
            label=f"{bits} bits, {processing}",
        )
    axes.set_xticks(range(len(methods)), methods, rotation=20 if len(methods) > 4 else 0)
    axes.set(
        xlabel="method",
        ylabel=f"relative proxy loss\n{LABEL}",
        yscale="log",
        title="Proxy loss over all matrices",
    )
    axes.grid(visible=True, axis="y", which="both", alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    save_figure(figure, path)
