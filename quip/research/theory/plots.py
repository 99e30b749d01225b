"""Claims as pictures: means against their formulas, and how far bounds are from what they bound."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quip.jobs.report.plots import save_figure
from quip.research.theory.claims import Claim

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Labelled = Sequence[tuple[str, Claim]]  # with the name of the group


def plot_equalities(found: Mapping[str, Sequence[Claim]], path: Path) -> None:
    """Measured over predicted, with bars of two standard errors, of all that is to be equal."""
    claims = [(group, c) for group, claims in found.items() for c in claims if c.relation == "="]
    if not claims:
        return
    figure, axes = _figure(claims)
    for y, (_, c) in enumerate(claims):
        bar = 2 * c.std_error / abs(c.predicted)
        axes.errorbar(c.ratio, y, xerr=bar, fmt="o", markersize=4, capsize=3, color=_colour(c))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(
        xlabel="measured / predicted (bars: two standard errors)",
        title="What the theorems state as equal",
    )
    save_figure(figure, path)


def plot_bounds(found: Mapping[str, Sequence[Claim]], path: Path) -> None:
    """Measured over bound, on a logarithmic axis: 1 is attained, and the left side is slack."""
    bounds = [(group, c) for group, claims in found.items() for c in claims if c.relation != "="]
    if not bounds:
        return
    figure, axes = _figure(bounds)
    for y, (_, c) in enumerate(bounds):
        if c.measured > 0:
            hollow = "none" if c.relation == ">=" else _colour(c)
            axes.plot(c.ratio, y, "o", markersize=5, color=_colour(c), markerfacecolor=hollow)
        else:
            axes.annotate("never", (1, y), fontsize=8, ha="right", va="center")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="measured / bound (filled: at most the bound; hollow: at least)",
        title="What the theorems bound",
    )
    save_figure(figure, path)


def _figure(claims: Labelled) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    height = max(4.5, 1.2 + 0.2 * len(claims))
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yticks(range(len(claims)), [f"{g}: {c.name}" for g, c in claims], fontsize=8)
    axes.set_ylim(len(claims) - 0.4, -0.6)
    axes.grid(visible=True, axis="x", which="both", alpha=0.3)
    return figure, axes


def _colour(claim: Claim) -> str:
    return "tab:red" if claim.verdict == "violated" else "tab:blue"
