"""Whether a folder can take the checkpoint of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quip.errors import UsageError
from quip.files import check_new
from quip.jobs.report.folder import read_report
from quip.packed.checkpoint import check_replaced


def check_save(
    save: Path,
    inputs: Sequence[str | Path | None],
    *,
    overwrite: bool,
    resume: bool,
    fingerprint: Mapping[str, Any] | None,
) -> None:
    """Refuse a folder that holds files, unless a run that is taken up has saved there already.

    With `overwrite` it is replaced whole, so it has to be a checkpoint, and not hold our inputs.
    Raises UsageError.
    """
    saved = read_report(save).get("fingerprint") if resume else None
    same = saved is not None and fingerprint in (None, saved)
    check_new(save, "--save", overwrite=overwrite or same)
    if overwrite and save.is_dir() and any(save.iterdir()):
        check_replaced(save)
        for name in inputs:
            if name and Path(name).expanduser().resolve().is_relative_to(save):
                raise UsageError(f"--save {save}: {name} is in it, and would be lost")
