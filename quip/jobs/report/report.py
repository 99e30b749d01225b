"""What is known of a run, written down as it grows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from quip.evaluate.memory import process_peak
from quip.jobs.report.folder import RunFolder
from quip.model.records import MatrixRecord


class Report:
    """What is known of a run so far; `save` adds to it and writes it whole."""

    def __init__(self, entries: Mapping[str, Any], *, folder: RunFolder | None, device: str):
        self.entries, self.folder, self.device = dict(entries), folder, device

    def save(self, status: str, **entries: Any) -> None:
        """Note what the run has come to, and write run.json if the run has a folder."""
        # Measuring a stretch of work resets the high-water mark: the largest seen counts.
        before, now = self.entries.get("peak_memory", {}), peak_memory(self.device)
        peak = {key: max(value, before.get(key, 0.0)) for key, value in now.items()}
        self.entries.update(entries, status=status, peak_memory=peak)
        if self.folder:
            self.folder.write_report(self.entries)

    def save_matrices(self, status: str, records: Sequence[MatrixRecord]) -> None:
        """Save the matrices and their totals too, and the files that show losses by depth."""
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
        finally:
            if self.folder:
                self.folder.release()


def peak_memory(device: torch.device | str) -> dict[str, float]:
    """Peak resident memory of this process, and of the device if it has its own, in GB."""
    peak = {"host_gb": process_peak() / 1e9}
    if torch.device(device).type == "cuda":
        peak["device_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peak


def summary(records: Sequence[MatrixRecord]) -> dict[str, Any]:
    """Totals over all matrices: bits are weighted by size, losses are plain means.

    Of mixtures, also how many tokens the matrices of experts saw.
    """
    weights = sum(r.rows * r.columns for r in records)
    return {
        "matrices": len(records),
        "weights": weights,
        "bits_per_weight": sum(r.bits_per_weight * r.rows * r.columns for r in records) / weights,
        "mean_proxy_loss": sum(r.proxy_loss for r in records) / len(records),
        "max_proxy_loss": max(r.proxy_loss for r in records),
        **_weighed([r for r in records if r.plain_loss is not None]),
        **_experts([r for r in records if r.tokens is not None]),
    }


def _weighed(records: Sequence[MatrixRecord]) -> dict[str, float]:
    """Where tokens have weights, the mean loss without them, and the damage of all matrices."""
    if not records:
        return {}
    return {
        "mean_plain_loss": sum(r.plain_loss or 0.0 for r in records) / len(records),
        "damage": sum(r.damage or 0.0 for r in records),
    }


def _experts(records: Sequence[MatrixRecord]) -> dict[str, dict[str, int | float]]:
    """Tokens that the matrices of experts saw; `short`: fewer than they have inputs."""
    tokens = [r.tokens or 0 for r in records]
    if not records:
        return {}
    return {
        "experts": {
            "matrices": len(records),
            "fewest_tokens": min(tokens),
            "median_tokens": median(tokens),
            "most_tokens": max(tokens),
            "short": sum(t < r.columns for t, r in zip(tokens, records, strict=True)),
            "idle": sum(not t for t in tokens),
        }
    }
