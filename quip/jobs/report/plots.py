"""What is easier seen than read."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quip.errors import Unavailable, how_to_install
from quip.files import replacing
from quip.model.records import MatrixRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    """Proxy loss of each matrix along depth, one line a role, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    roles: dict[str, list[MatrixRecord]] = {}
    for record in records:
        roles.setdefault(record.name.rpartition(".")[2], []).append(record)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
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
    figure.legend(fontsize="small", loc="outside right upper")
    save_figure(figure, path)
