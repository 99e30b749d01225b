"""The folder of a bench: its settings, its losses as they come, and what is made of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quip.errors import UsageError
from quip.files import write_csv
from quip.jobs.report.folder import RunFolder
from quip.research.losses.plots import write_plots
from quip.research.losses.rows import LossRow, read_losses, summarised

SETTINGS = ("model", "digest", "flags", "seed", "dtype")  # that all losses of a folder share


class LossFolder:
    """run.json, proxy.csv, summary.csv, depth.png and methods.png; one bench at a time.

    Without a path nothing is kept.
    """

    FILES = ("proxy.csv", "summary.csv", "depth.png", "methods.png")

    def __init__(self, path: Path | None, *, resume: bool, overwrite: bool) -> None:
        """Raises UsageError for a path that cannot be made or holds files not to be lost."""
        self.path = path
        if path:
            self._resume = resume and (path / "proxy.csv").exists()
            self._folder = RunFolder(path, overwrite=overwrite or self._resume, resume=self._resume)

    @contextmanager
    def opened(self, settings: Mapping[str, Any]) -> Iterator[list[LossRow]]:
        """The losses that it holds of these settings; others are kept out meanwhile.

        Raises UsageError where it is taken up and its losses are of other settings.
        """
        if self.path is None:
            yield []
            return
        earlier = self._folder.earlier_report()
        for key in SETTINGS if self._resume else ():
            if earlier.get(key) != settings[key]:
                raise UsageError(
                    f"--resume: {self.path} holds losses with {key} {earlier.get(key)}, not "
                    f"{settings[key]}; name another folder, or start over with --overwrite"
                )
        losses = read_losses(self.path / "proxy.csv") if self._resume else []
        self._folder.open()
        try:
            for name in () if self._resume else self.FILES:
                (self.path / name).unlink(missing_ok=True)
            self._folder.write_report(settings)
            yield losses
        finally:
            self._folder.release()

    def keep(self, losses: Sequence[LossRow]) -> None:
        """proxy.csv, whole."""
        if self.path:
            write_csv(self.path / "proxy.csv", [asdict(loss) for loss in losses])

    def finish(self, losses: Sequence[LossRow]) -> None:
        """proxy.csv in order, its means, and plots where matplotlib is installed."""
        self.keep(losses)
        if self.path:
            write_csv(self.path / "summary.csv", summarised(losses))
            write_plots(losses, self.path)
