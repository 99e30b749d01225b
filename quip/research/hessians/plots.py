"""A summary as pictures: what incoherence processing does to eigenvalues, entries and weights."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quip.jobs.report.plots import save_figure
from quip.research.hessians.rows import EDGES, Row, Summary
from quip.research.hessians.spectrum import SHARE, zero

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECADES = 3  # of a heat map's colours


def write_plots(summary: Summary, folder: Path) -> None:
    """All pictures of a summary; of weights where it has any."""
    for name, plot in PICTURES.items():
        if plot is not plot_weights or summary.matrices:
            save_figure(plot(summary), folder / name)


def plot_spectra(summary: Summary) -> "Figure":
    """Eigenvalues of each H over its largest, a panel for each role, a line for each block."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = [row for row in summary.inputs if row.processing == "original"]
    shown = {"as collected": rows}
    if summary.settings["rescale"]:
        shown["rescaled"] = [row for row in summary.matrices if row.processing == "rescaled"]
    roles = list(dict.fromkeys(row.input for row in rows))
    floor = min(zero(row.columns) for row in rows)
    depth = Normalize(0, max(1, *(row.block for row in rows)))
    colours = ScalarMappable(depth, "viridis")
    figure = Figure(figsize=(2 + 2.4 * len(roles), 1.4 + 2.3 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), len(roles), sharex=True, sharey=True, squeeze=False)
    for line, (title, some) in zip(grid, shown.items(), strict=True):
        for axes, role in zip(line, roles, strict=True):
            for row in some:
                if row.input == role:
                    _spectrum(axes, row, colours.cmap(depth(row.block)))
            axes.axhline(SHARE, color="grey", linestyle="--", linewidth=0.8)
            axes.set(yscale="log", ylim=(floor / 2, 1.5), xlim=(0, 1))
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.yaxis.set_major_locator(LogLocator(10))
            axes.set_title(f"{role}, {title}", fontsize="small")
            axes.grid(visible=True, alpha=0.3)
    figure.supxlabel("index of the eigenvalue / n", fontsize="medium")
    figure.supylabel(r"eigenvalue / largest eigenvalue", fontsize="medium")
    bar = figure.colorbar(colours, ax=grid, label="block", aspect=30)
    bar.locator = _whole()
    figure.suptitle("Eigenvalues of H by input (dashed: 1 %; a rotation changes none)")
    return figure


def _spectrum(axes: Any, row: Row, colour: Any) -> None:
    values, n = row.spectrum / row.spectrum[0], len(row.spectrum)
    kept = int((values > zero(n)).sum())  # what follows is rounding
    axes.plot((torch.arange(kept) / n).numpy(), values[:kept].numpy(), color=colour, linewidth=1)


def plot_incoherence(summary: Summary) -> "Figure":
    """mu of H, and of W, along depth: before and after side by side, a line for each role."""
    from matplotlib.figure import Figure

    rows = summary.matrices or summary.inputs
    lines: dict[str, Callable[[Row], float]] = {
        "$\\mu_H$ = max |Q$_{ij}$| $\\sqrt{n}$": lambda row: row.hessian.mu
    }
    if summary.matrices:
        mu = r"$\mu_W$ = max |W$_{ij}$| $\sqrt{mn}$ / $\|W\|_F$"
        lines[mu] = lambda row: row.weights.mu_W if row.weights else 0
    roles = list(dict.fromkeys(row.role for row in rows))
    figure = Figure(figsize=(10, 1.2 + 3.3 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), 2, squeeze=False, sharex=True, sharey="row")
    for line, (label, mu_of) in zip(grid, lines.items(), strict=True):
        for axes, processing in zip(line, ("original", _processings(rows)[-1]), strict=True):
            for role in roles:
                some = [r for r in rows if (r.role, r.processing) == (role, processing)]
                depth, mus = [r.block for r in some], [mu_of(r) for r in some]
                axes.plot(depth, mus, "o-", markersize=3, linewidth=1, label=role)
            axes.set(yscale="log", title=processing)
            axes.xaxis.set_major_locator(_whole())
            axes.yaxis.set_minor_formatter(_plain())
            axes.yaxis.set_major_formatter(_plain())
            axes.grid(visible=True, which="both", alpha=0.3)
        line[0].set_ylabel(label)
    figure.supxlabel("block", fontsize="medium")
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), fontsize="small", loc="outside right upper"
    )
    shared = " (at first matrices of one input share its H)" if summary.matrices else ""
    figure.suptitle(f"Incoherence along depth{shared}")
    return figure


def plot_weights(summary: Summary) -> "Figure":
    """The density of all weights, each matrix over its RMS, beside a Gaussian's."""
    from matplotlib.figure import Figure

    centres, width = (EDGES[1:] + EDGES[:-1]) / 2, float(EDGES[1] - EDGES[0])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, widest, seen = figure.add_subplot(), 8.0, [1.0]
    for processing in _processings(summary.matrices):
        rows = [row for row in summary.matrices if row.processing == processing]
        counts = sum((row.histogram for row in rows if row.histogram is not None), 0 * centres)
        density = counts / counts.sum() / width
        seen += density[density > 0].tolist()
        density[density == 0] = math.nan  # a gap, and no line down to 0
        top = max(row.weights.mu_W for row in rows if row.weights)
        label, widest = f"{processing} (largest: {top:.1f} RMS)", max(widest, top)
        axes.stairs(density.numpy(), EDGES.numpy(), baseline=None, label=label)
    gaussian = (-centres.square() / 2).exp() / math.sqrt(2 * math.pi)
    axes.plot(centres.numpy(), gaussian.numpy(), "k--", linewidth=1, label="Gaussian")
    # Linear where nearly all weights are, and logarithmic in the tails.
    end = min(int(EDGES[-1]), 2 ** math.ceil(math.log2(widest)))
    beyond = f"; beyond {end} counts as {end}" if widest > end else ""
    axes.set_xscale("symlog", base=2, linthresh=4, linscale=2)
    ticks = [0, *(sign * 2**k for k in range(1, end.bit_length()) for sign in (-1, 1))]
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.set(
        xlabel=f"weight / RMS of its matrix (logarithmic from 4{beyond})",
        ylabel="density",
        yscale="log",
        xlim=(-end, end),
        ylim=(min(seen) / 2, 2 * max(seen)),
        title=f"Weights of {len(rows)} matrices, before and after processing",
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small", loc="lower center")
    return figure


def plot_entries(summary: Summary) -> "Figure":
    """|H_ij| over the mean of the diagonal, of the example layer at each stage."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    stages = summary.example
    n, top = len(stages[0].incoherence), max(float(stage.entries.max()) for stage in stages)
    norm = LogNorm(top / 10**DECADES, top)
    figure = Figure(figsize=(1.2 + 3.6 * len(stages), 4.4), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, stage in zip(panels, stages, strict=True):
        image = axes.imshow(
            stage.entries.numpy(), norm=norm, cmap="magma", extent=(0.5, n + 0.5, n + 0.5, 0.5)
        )
        axes.set_title(
            f"{stage.processing}\nlargest $H_{{ii}}$ / mean: {stage.spread:.1f}", fontsize="medium"
        )
        axes.set(xlabel="input j", ylabel="input i")
    figure.colorbar(image, ax=panels, label="|H$_{ij}$| / mean of the diagonal", extend="min")
    figure.suptitle(f"Entries of H: {stages[-1].name}", fontsize="medium")
    return figure


def plot_vectors(summary: Summary) -> "Figure":
    """|Q_ij| sqrt(n) of the example layer at each stage, and the largest of each eigenvector."""
    from matplotlib.figure import Figure

    stages = summary.example
    n = len(stages[0].incoherence)
    gaussian = math.sqrt(2 * math.log(n))
    zeros = "eigenvalue 0" if any(stage.rank < n for stage in stages) else None
    figure = Figure(figsize=(1.2 + 3.6 * len(stages), 6.2), layout="constrained")
    grid = figure.subplots(
        2, len(stages), squeeze=False, sharex=True, height_ratios=(3, 2), sharey="row"
    )
    for (above, below), stage in zip(grid.T, stages, strict=True):
        largest, rank = stage.incoherence.numpy(), stage.rank
        image = above.imshow(
            stage.vectors.numpy(),
            vmin=0,
            vmax=2 * gaussian,
            cmap="magma",
            extent=(0.5, n + 0.5, n + 0.5, 0.5),
            aspect="auto",
        )
        above.set_title(f"{stage.processing}: $\\mu_H$ = {stage.mu:.1f}", fontsize="medium")
        index = torch.arange(1, n + 1).numpy()
        below.plot(index[:rank], largest[:rank], ".", markersize=2)
        below.plot(index[rank:], largest[rank:], ".", markersize=2, color="grey", label=zeros)
        for axes in (above, below):
            axes.axvline(rank + 0.5, color="grey", linewidth=0.8)
        below.axhline(gaussian, color="k", linestyle="--", linewidth=1, label=r"$\sqrt{2\,\ln n}$")
        below.set(xlabel="eigenvector j, largest eigenvalue first", yscale="log")
        below.yaxis.set_major_formatter(_plain())
        below.yaxis.set_minor_formatter(_plain())
        below.grid(visible=True, which="both", alpha=0.3)
    grid[0][0].set_ylabel("input i")
    grid[1][0].set_ylabel(r"max$_i$ |Q$_{ij}$| $\sqrt{n}$")
    grid[1][0].legend(fontsize="small")
    figure.colorbar(image, ax=grid[0], label=r"|Q$_{ij}$| $\sqrt{n}$", extend="max")
    figure.suptitle(f"Eigenvectors of H: {stages[-1].name}", fontsize="medium")
    return figure


def _processings(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.processing for row in rows))


def _whole() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, min_n_ticks=1)


def _plain() -> Any:
    from matplotlib.ticker import LogFormatter

    return LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5))


PICTURES: dict[str, Callable[[Summary], "Figure"]] = {
    "spectrum.png": plot_spectra,
    "incoherence.png": plot_incoherence,
    "hessian_entries.png": plot_entries,
    "singular_vectors.png": plot_vectors,
    "weights.png": plot_weights,
}
