"""Draw docs/perplexity.svg from results/: perplexity against bits, all methods, both models.

    python scripts/dev/draw_perplexity.py

The file names the digest of the points and of this script, so that `render_docs.py --check` can
tell without matplotlib whether it is up to date.
"""

import io
import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator
from measured import MODELS, Point, digest, points

PLOT = Path(__file__).parents[2] / "docs" / "perplexity.svg"
COLOURS = {
    "baseline": ("#8a8a8a", "as they are"),
    "as printed": ("#85b8e8", "incoherence, as printed"),
    "incoherence": ("#1a5fb4", "incoherence, ours"),
    "lattice": ("#e66100", "lattice E8 (QuIP#)"),
    "fine-tuned": ("#b5179e", "lattice E8, fine-tuned"),
    "learned": ("#2a9d3a", "learned codebooks (GPTVQ)"),
    "trellis": ("#8a6d00", "trellis codes (QTIP)"),
    "felt": ("#c00000", "best recipes"),
}
MARKERS = {
    "nearest": ("o", "nearest"),
    "gptq": ("s", "OPTQ, LDLQ"),
    "ldlq": ("s", "OPTQ, LDLQ"),
    "ldlqRG": ("^", "LDLQ-RG"),
    "allbal": ("D", "greedy"),
    "ldlbal_admm": ("v", "Algorithm 5"),
    "a": ("<", "tuned by block (a)"),
    "b": (">", "tuned whole (b)"),
    "ab": ("P", "both"),
    "1D": ("1", "single weights"),
    "2D": ("2", "pairs"),
    "4D": ("p", "of four"),
    "walk": ("*", "a walk"),
}
# OPTQ is LDLQ; printed forms of other methods lie beside LDLQ's.
LEFT_OUT = {("baseline", "ldlq"), ("incoherence", "gptq")} | {
    ("as printed", method) for method in MARKERS if method != "ldlq"
}
TOP = 30.0  # of the axis; what lies above is drawn there


def main() -> int:
    PLOT.write_text(svg())
    print(f"written: {PLOT.name}, {PLOT.stat().st_size / 1e3:.0f} kB")
    return 0


def svg() -> str:
    """The plot; the same text whenever it is drawn by the same matplotlib."""
    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "quip", "font.size": 9})
    figure = Figure(figsize=(8, 4.7), layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2)
    for ax, (model, title) in zip(axes, MODELS.items(), strict=True):
        _panel(ax, [p for p in _drawn() if p.model == model], title)
    axes[0].set_ylabel("perplexity above the original's")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Title": f"drawn from {digest()}"})
    text = re.sub(r"(\d\.\d{3})\d+", r"\1", out.getvalue())  # thousandths of a point will do
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _drawn() -> list[Point]:
    return [p for p in points() if (p.processing, p.method) not in LEFT_OUT]


def _panel(ax: Axes, found: list[Point], title: str) -> None:
    """A line for each method, at the bits as stored."""
    for processing, method in dict.fromkeys((p.processing, p.method) for p in found):
        line = [p for p in found if (p.processing, p.method) == (processing, method)]
        colour, marker = COLOURS[processing][0], MARKERS[method][0]
        ax.plot(
            [p.stored or p.bits for p in line],
            [min(p.excess, TOP) for p in line],
            color=colour,
            linewidth=1,
            alpha=0.8,
        )
        for p in line:
            ax.plot(
                p.stored or p.bits,
                min(p.excess, TOP),
                marker,
                color=colour,
                markersize=5,
                fillstyle="full" if p.stored else "none",
                clip_on=False,
            )
    if any(p.excess > TOP for p in found):
        ax.annotate("off the scale", (2.28, TOP), va="center", color="#606060")
    ax.set(title=title, yscale="log", xticks=(2, 3, 4))
    ax.set_xlabel("bits per weight, all that a file needs")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.1%}" if y < 0.01 else f"{y:.0%}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y", color="#e0e0e0", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _legend() -> list[Line2D]:
    """Processing by colour, then methods by marker."""
    lines = [Line2D([], [], color=c, linewidth=3, label=name) for c, name in COLOURS.values()]
    markers = [
        Line2D([], [], color="#404040", linestyle="", marker=marker, markersize=5, label=name)
        for marker, name in dict.fromkeys(MARKERS.values())
    ]
    hollow = Line2D([], [], color="#404040", linestyle="", marker="o", markersize=5)
    hollow.set(fillstyle="none", label="hollow: bits in name only")
    return [*lines, *markers, hollow]


if __name__ == "__main__":
    raise SystemExit(main())
