"""What a run leaves behind: run.json, layers.csv, a plot, and the table on the terminal."""

import csv
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from quip.errors import Unavailable, UsageError
from quip.pipeline import MatrixRecord

PACKAGES = ("quip-quant", "torch", "transformers", "datasets", "numpy", "safetensors")


class RunFolder:
    """The folder of one run, made when something is first written to it.

    What is written appears under its name only when it is complete.
    """

    FILES = ("run.json", "layers.csv", "layers.png")

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Raises UsageError for a path that cannot be made, or that holds files not to be lost."""
        if path.exists() and not path.is_dir():
            raise UsageError(f"--out {path}: it is a file; name a folder")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise UsageError(
                f"--out {path}: it exists and is not empty; name another folder or add --overwrite"
            )
        above = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise UsageError(f"--out {path}: {above} is no folder that can be written to")
        self.path, self._made = path, False

    def write_report(self, report: Mapping[str, Any]) -> None:
        """run.json. JSON has no NaN or infinity: they are the strings nan, inf and -inf."""
        text = json.dumps(_as_json(report), indent=2, allow_nan=False)
        with self._replacing("run.json") as partial:
            partial.write_text(text + "\n")

    def write_layers(self, records: Sequence[MatrixRecord]) -> None:
        """layers.csv, and layers.png where matplotlib is installed."""
        with self._replacing("layers.csv") as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(MatrixRecord.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(record) for record in records)
        if find_spec("matplotlib") is not None:
            with self._replacing("layers.png") as partial:
                plot_losses(records, partial)

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """Another path to write to, which takes the name's place when the block ends well."""
        final, partial = self.path / name, self.path / f".{name}.partial"
        try:
            self._make()
            yield partial
            os.replace(partial, final)
        except OSError as error:
            raise Unavailable(
                f"--out {self.path}: {name} cannot be written ({error.strerror or error}); "
                "make room, or name another folder"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def _make(self) -> None:
        if not self._made:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in self.FILES:  # of the run before: one folder never mixes two
                (self.path / name).unlink(missing_ok=True)
            self._made = True


class Report:
    """What is known of a run so far; `save` adds to it and writes it whole."""

    def __init__(self, entries: Mapping[str, Any], *, folder: RunFolder | None, device: str):
        self.entries, self.folder, self.device = dict(entries), folder, device

    def save(self, status: str, **entries: Any) -> None:
        """Note what the run has come to, and write run.json if the run has a folder."""
        self.entries.update(entries, status=status, peak_memory=peak_memory(self.device))
        if self.folder:
            self.folder.write_report(self.entries)

    def save_matrices(self, status: str, records: Sequence[MatrixRecord]) -> None:
        """The same with the matrices, their totals, and the files that show them by depth."""
        if self.folder:
            self.folder.write_layers(records)
        matrices = [asdict(record) for record in records]
        self.save(status, totals=summary(records), matrices=matrices)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever ends the block early is written down beside what was reached by then."""
        try:
            yield
        except BaseException as error:
            self.save("failed", error=f"{type(error).__name__}: {error}")
            raise


def _as_json(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(key): _as_json(item) for key, item in value.items()}
        case list() | tuple():
            return [_as_json(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case None | bool() | int() | float() | str():
            return value
    return str(value)  # a path


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


def summary(records: Sequence[MatrixRecord]) -> dict[str, int | float]:
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
    if perplexity := report.get("perplexity"):
        lines += ["", *_perplexities(perplexity, report.get("original_perplexity", {}))]
    spent = ", ".join(f"{stage} {s:.1f} s" for stage, s in report.get("seconds", {}).items())
    peak = report.get("peak_memory", {})
    used = ", ".join(f"{key.removesuffix('_gb')} {peak[key]:.2f} GB" for key in peak)
    return "\n".join([*lines, "", f"time: {spent}", f"peak memory: {used}"])


def _perplexities(found: Mapping[str, float], original: Mapping[str, float]) -> list[str]:
    width = max(28, *(len(name) + 2 for name in found))
    if not original:
        rows = [f"{name:<{width}}{value:>12.4g}" for name, value in found.items()]
        return ["perplexity", *rows]
    lines = [f"{'perplexity':<{width}}{'original':>12}{'quantized':>12}{'change':>10}"]
    for name, value in found.items():
        before = original[name]
        finite = math.isfinite(before) and math.isfinite(value)
        change = f"{value / before - 1:+.1%}" if finite else "-"
        lines.append(f"{name:<{width}}{before:>12.4g}{value:>12.4g}{change:>10}")
    return lines
