"""What is easier seen than read."""

from collections.abc import Sequence
from importlib.util import find_spec
from math import nan
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from quip.errors import Unavailable, how_to_install
from quip.files import replacing
from quip.model.records import MatrixRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEP = 0.49  # bits: the least that two widths of codes are apart, but for rounding


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_plots(flag: str) -> None:
    """Raise Unavailable, naming the flag that asks for a plot, where none can be made."""
    if not can_plot():
        raise Unavailable(
            f"{flag} needs the package matplotlib; install it with: {how_to_install('plot')}"
        )


def save_figure(figure: "Figure", path: Path) -> None:
    """As a PNG that appears when it is complete."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def write_plot(records: Sequence[MatrixRecord], folder: Path) -> None:
    """layers.png in the folder, where matplotlib is installed and there is something to plot."""
    if records and can_plot():
        plot_losses(records, folder / "layers.png")


def plot_losses(records: Sequence[MatrixRecord], path: Path) -> None:
    """Proxy loss of each matrix along depth, one line a role, as a PNG; below, bits that differ."""
    from matplotlib.figure import Figure

    mixed = has_mixed_bits(records)
    figure = Figure(figsize=(8, 7.5 if mixed else 4.5), layout="constrained")
    axes, *below = figure.subplots(2, height_ratios=(3, 2)) if mixed else [figure.add_subplot()]
    _draw_losses(axes, records)
    figure.legend(fontsize="small", loc="outside right upper")
    for one in below:
        _draw_bits(figure, one, records)
    save_figure(figure, path)


def has_mixed_bits(records: Sequence[MatrixRecord]) -> bool:
    """Whether matrices have other bits by plan, and not by what is stored beside their codes."""
    bits = [record.bits_per_weight for record in records]
    alike: dict[tuple[str, int, int], set[float]] = {}
    for record in records:
        alike.setdefault((_role(record), record.rows, record.columns), set()).add(
            round(record.bits_per_weight, 2)
        )
    return max(bits) - min(bits) >= STEP or any(len(found) > 1 for found in alike.values())


def _role(record: MatrixRecord) -> str:
    return record.name.rpartition(".")[2]


def _draw_losses(axes: "Axes", records: Sequence[MatrixRecord]) -> None:
    from matplotlib.ticker import MaxNLocator

    roles: dict[str, list[MatrixRecord]] = {}
    for record in records:
        roles.setdefault(_role(record), []).append(record)
    for role, line in roles.items():
        depth, losses = [r.block for r in line], [r.proxy_loss for r in line]
        axes.plot(depth, losses, marker="o", markersize=3, label=role)
    axes.set(
        xlabel="block",
        ylabel="relative proxy loss  tr(E H E$^T$) / tr(W H W$^T$)",
        yscale="log",
        title="Error of each quantized matrix",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, which="both", alpha=0.3)


def _draw_bits(figure: "Figure", axes: "Axes", records: Sequence[MatrixRecord]) -> None:
    """A cell for each block and role; of experts, their mean."""
    from matplotlib.ticker import MaxNLocator

    roles = list(dict.fromkeys(map(_role, records)))
    cells: dict[tuple[str, int], list[float]] = {}
    for record in records:
        cells.setdefault((_role(record), record.block), []).append(record.bits_per_weight)
    blocks = range(1 + max(record.block for record in records))
    rows = [[mean(cells.get((role, block), [nan])) for block in blocks] for role in roles]
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set(xlabel="block", title="Bits per weight")
    axes.set_yticks(range(len(roles)), labels=roles, fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes)
