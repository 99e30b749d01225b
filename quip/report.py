"""What a run leaves behind: run.json, layers.csv, a plot, and the table on the terminal."""

import csv
import json
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from quip.errors import UsageError
from quip.pipeline import MatrixRecord

PACKAGES = ("quip-quant", "torch", "transformers", "datasets", "numpy", "safetensors")


class RunFolder:
    """The folder of one run; what is written appears under its name only when it is complete."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Raises UsageError if the path is not a folder, or holds files and may not be reused."""
        if path.exists() and not path.is_dir():
            raise UsageError(f"--out {path}: it is a file; name a folder")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise UsageError(
                f"--out {path}: it exists and is not empty; name another folder or add --overwrite"
            )
        path.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write_report(self, report: Mapping[str, Any]) -> None:
        """run.json."""
        with self._replacing("run.json") as partial:
            partial.write_text(json.dumps(report, indent=2, default=str) + "\n")

    def write_layers(self, records: Sequence[MatrixRecord]) -> None:
        """layers.csv, and layers.png where matplotlib is installed."""
        with self._replacing("layers.csv") as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(MatrixRecord.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(record) for record in records)
        plot_losses(records, self.path / "layers.png")

    def _replacing(self, name: str) -> "_Replacing":
        return _Replacing(self.path / name)


class _Replacing:
    """A file to write under another name, moved into place when the block ends well."""

    def __init__(self, final: Path) -> None:
        self.final, self.partial = final, final.with_name(f".{final.name}.partial")

    def __enter__(self) -> Path:
        return self.partial

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self.partial, self.final)
        else:
            self.partial.unlink(missing_ok=True)


def plot_losses(records: Sequence[MatrixRecord], path: Path) -> bool:
    """Proxy loss of each matrix along depth, one line a role; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
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
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return True


def versions() -> dict[str, str]:
    """Of Python and the packages whose behaviour the numbers may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory(device: torch.device | str) -> dict[str, float]:
    """Peak resident memory of this process, and of the device if it has its own, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    peak = {"host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if torch.device(device).type == "cuda":
        peak["device_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peak


def summary(records: Sequence[MatrixRecord]) -> dict[str, float]:
    """Totals over all matrices: bits are weighted by size, losses are plain means."""
    weights = sum(r.rows * r.columns for r in records)
    return {
        "matrices": len(records),
        "weights": weights,
        "bits_per_weight": sum(r.bits_per_weight * r.rows * r.columns for r in records) / weights,
        "mean_proxy_loss": sum(r.proxy_loss for r in records) / len(records),
        "max_proxy_loss": max(r.proxy_loss for r in records),
    }


def table(report: Mapping[str, Any]) -> str:
    """The result in a few lines for a person."""
    lines = [f"{report['model']}  {report['method']}"]
    if totals := report.get("totals"):
        lines.append(
            f"{totals['matrices']} matrices at {totals['bits_per_weight']:.3f} bits per weight, "
            f"mean proxy loss {totals['mean_proxy_loss']:.3g}"
        )
    original = report.get("original_perplexity", {})
    if perplexity := report.get("perplexity"):
        lines.append("")
        head = f"{'perplexity':<28}{'original':>12}{'quantized':>12}{'change':>10}"
        lines.append(head if original else f"{'perplexity':<28}{'':>12}")
        for name, value in perplexity.items():
            row = f"{name:<28}"
            if name in original:
                row += f"{original[name]:>12.4g}{value:>12.4g}{value / original[name] - 1:>+10.1%}"
            else:
                row += f"{value:>12.4g}"
            lines.append(row)
    spent = ", ".join(f"{stage} {s:.1f} s" for stage, s in report.get("seconds", {}).items())
    peak = report.get("peak_memory", {})
    used = ", ".join(f"{key.removesuffix('_gb')} {peak[key]:.2f} GB" for key in peak)
    return "\n".join([*lines, "", f"time: {spent}", f"peak memory: {used}"])
