"""What is easier seen than read."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from quip.files import replacing
from quip.records import MatrixRecord


def write_plot(records: Sequence[MatrixRecord], folder: Path) -> None:
    """layers.png in the folder, where matplotlib is installed and there is something to plot."""
    if records and find_spec("matplotlib") is not None:
        with replacing(folder / "layers.png") as partial:
            plot_losses(records, partial)


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
    figure.savefig(path, dpi=150, format="png")
