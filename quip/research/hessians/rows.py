"""The rows of a summary, their means, and the files they go into."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from quip.files import replacing, write_csv
from quip.research.hessians.spectrum import HessianNumbers, WeightNumbers
from quip.research.hessians.stages import Stage
from quip.research.tables.papers import lookup, papers_name

TABLES = ("hessians.csv", "matrices.csv", "summary.json", "spectra.safetensors")
METRICS = {
    "rank": "rank",
    "above_1_percent": "eigenvalues above 1 %",
    "D_backwards": "trD/trH",
}
EDGES = torch.linspace(-64, 64, 513, dtype=torch.float64)  # of histograms, in RMS of the weights
PIXELS = 256  # of a heat map; of larger matrices the largest entry of each cell is shown


@dataclass(frozen=True, kw_only=True)
class Row:
    """One input, or one matrix with its input, at one stage of processing."""

    name: str
    role: str  # in its block
    input: str  # the role of its input: those of all matrices that share it
    block: int
    rows: int | None  # m; None for an input alone
    columns: int  # n
    tokens: int
    processing: str
    matrices: int  # that it stands for
    hessian: HessianNumbers
    weights: WeightNumbers | None
    spectrum: Float[Tensor, " n"]  # eigenvalues of H, largest first
    histogram: Float[Tensor, " bins"] | None  # of weights over their RMS, between EDGES

    def flat(self) -> dict[str, object]:
        """All numbers in one line, for a file."""
        apart = ("hessian", "weights", "spectrum", "histogram")
        words = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        if self.weights is None:
            return {k: x for k, x in words.items() if k != "rows"} | asdict(self.hessian)
        return words | asdict(self.weights) | asdict(self.hessian)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One stage of the example layer, as little of it as pictures show: k is at most PIXELS."""

    name: str
    processing: str
    entries: Float[Tensor, "k k"]  # |H_ij| over the mean of the diagonal
    spread: float  # max H_ii over the same
    vectors: Float[Tensor, "k k"]  # |Q_ij| sqrt(n)
    incoherence: Float[Tensor, " n"]  # max_i |Q_ij| sqrt(n) of each eigenvector
    rank: int
    mu: float

    @classmethod
    def of(cls, stage: Stage) -> "Example":
        diagonal, spectrum = stage.H.diagonal(), stage.spectrum
        return cls(
            name=stage.name,
            processing=stage.processing,
            entries=_pooled(stage.H) / diagonal.mean().cpu(),
            spread=float(diagonal.max() / diagonal.mean()),
            vectors=_pooled(spectrum.vectors) * math.sqrt(len(diagonal)),
            incoherence=spectrum.incoherence.cpu(),
            rank=spectrum.rank,
            mu=stage.numbers.mu,
        )


@dataclass
class Summary:
    """What a summary came to; it grows input by input."""

    settings: Mapping[str, Any]
    inputs: list[Row] = field(default_factory=list)
    matrices: list[Row] = field(default_factory=list)
    example: list[Example] = field(default_factory=list)  # at all stages, for pictures

    def add(self, row: Row) -> None:
        (self.inputs if row.weights is None else self.matrices).append(row)

    def as_json(self) -> dict[str, Any]:
        """Everything but spectra and plots."""
        rows = self.matrices or self.inputs
        return {
            **self.settings,
            "paper": table_6(str(self.settings["store"]["model"])),
            "hessian_means": means(rows, "hessian", "input"),
            "weight_means": means(self.matrices, "weights", "role"),
            "inputs": [row.flat() for row in self.inputs],
            "matrices": [row.flat() for row in self.matrices],
        }


def _pooled(A: Float[Tensor, "n n"]) -> Float[Tensor, "k k"]:
    """|A|, the largest of each cell, at most PIXELS x PIXELS of them."""
    A = A.abs()
    return adaptive_max_pool2d(A[None], PIXELS)[0].cpu() if len(A) > PIXELS else A.cpu()


def histogram(W: Float[Tensor, "m n"]) -> Float[Tensor, " bins"]:
    """Counts of weights over their RMS; those beyond the edges count as on them."""
    low, high = float(EDGES[0]), float(EDGES[-1])
    rms = W.square().mean().sqrt().clamp_min(torch.finfo(W.dtype).tiny)
    return torch.histc((W / rms).clamp(low, high).cpu(), len(EDGES) - 1, low, high)


def means(rows: Sequence[Row], numbers: str, key: str) -> list[dict[str, Any]]:
    """Mean and standard deviation of `hessian` or `weights`, over all rows and by role.

    Each row counts as often as it stands for a matrix, as in the paper, which has one H a matrix.
    """
    found = []
    for role in dict.fromkeys(["all", *(getattr(row, key) for row in rows)]):
        for processing in dict.fromkeys(row.processing for row in rows):
            several = [
                asdict(getattr(row, numbers))
                for row in rows
                for _ in range(row.matrices)
                if row.processing == processing and role in ("all", getattr(row, key))
            ]
            spread = {
                name: {
                    "mean": fmean(one[name] for one in several),
                    "std": pstdev([one[name] for one in several]),
                }
                for name in several[0]
            }
            found.append({"role": role, "processing": processing, "count": len(several)} | spread)
    return found


def table_6(model: str) -> dict[str, dict[str, float]]:
    """What QuIP's Table 6 has of a model by its hub id: means over its Hessians by processing."""
    name = papers_name(model) or ""
    found: dict[str, dict[str, float]] = {}
    for processing, (key, metric) in product(("baseline", "IncP"), METRICS.items()):
        words = {"model": name, "processing": processing, "method": "Hessian", "metric": metric}
        if (value := lookup(words)) is not None:
            found.setdefault(processing, {})[key] = value
    return found


def write_rows(summary: Summary, folder: Path) -> None:
    for name, rows in (("hessians", summary.inputs), ("matrices", summary.matrices)):
        if rows:
            write_csv(folder / f"{name}.csv", [row.flat() for row in rows])


def write_rest(summary: Summary, folder: Path) -> None:
    with replacing(folder / "summary.json") as partial:
        partial.write_text(json.dumps(summary.as_json(), indent=2, allow_nan=False) + "\n")
    with replacing(folder / "spectra.safetensors") as partial:
        save_file(dict(_spectra(summary)), partial)


def _spectra(summary: Summary) -> Iterator[tuple[str, Tensor]]:
    """Eigenvalues by "NAME, processing"; a rotation leaves them."""
    for row in (*summary.inputs, *(x for x in summary.matrices if x.processing != "original")):
        if "rotated" not in row.processing:
            yield f"{row.name}, {row.processing}", row.spectrum.contiguous()
