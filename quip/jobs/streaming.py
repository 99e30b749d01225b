"""What a job does otherwise where its model is streamed: its ledger, its checks, its disk."""

import logging
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

from quip.data.hessians import HessianStore
from quip.errors import UsageError
from quip.jobs.fingerprint import Source
from quip.jobs.report.lock import FolderLock
from quip.model.ledger import Ledger
from quip.model.load import LoadedModel
from quip.model.matrices import check_weights, find_blocks
from quip.model.stream import Stream

log = logging.getLogger(__name__)
BITS = 1  # of a quantized weight at least, with whatever else is stored of its matrix
GB = 1e9
TEMPORARY = ".quip-blocks-"  # how folders of finished blocks begin that nobody named
FRESH = 60.0  # seconds, for which a lock may not be held yet by the process that made it


def check_all_weights(loaded: LoadedModel) -> None:
    """Raise NonFinite as `check_weights` does; a model that is streamed is read block by block.

    Its digest comes of the same reading.
    """
    if loaded.stream:
        loaded.stream.digest(loaded.model)
    else:
        check_weights(loaded.model)


class TemporaryLedger(Ledger):
    """A ledger in a folder of its own, which is removed at the latest when the process ends.

    Of a process that was killed it stays, until the next one makes a folder in the same place.
    """

    def __init__(
        self, place: Path | None, fingerprint: Mapping[str, Any], stream: Stream | None
    ) -> None:
        """The folder is made in `place`; None: where temporary files are."""
        remove_abandoned(place or Path(tempfile.gettempdir()))
        made = tempfile.mkdtemp(prefix=TEMPORARY, dir=place)
        lock = FolderLock(Path(made))
        lock.take()
        super().__init__(Path(made) / "blocks", fingerprint, stream)
        self.remove = weakref.finalize(self, _remove, Path(made), lock)


def remove_abandoned(place: Path) -> None:
    """Remove the folders of temporary ledgers in this place whose processes are gone."""
    for folder in place.glob(f"{TEMPORARY}*"):
        lock = FolderLock(folder)
        with suppress(OSError):  # it is gone, or another user's
            if time.time() - lock.path.lstat().st_mtime > FRESH and lock.take():
                _remove(folder, lock)


def _remove(folder: Path, lock: FolderLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


@contextmanager
def no_longer_than_this(ledger: Ledger | None) -> Iterator[None]:
    """A temporary ledger is removed at the end of the block."""
    try:
        yield
    finally:
        if isinstance(ledger, TemporaryLedger):
            # A signal, which raises in the main thread alone, would leave the rest of it.
            removal = Thread(target=ledger.remove)
            removal.start()
            removal.join()


def ledger_for(
    loaded: LoadedModel,
    fingerprint: Mapping[str, Any],
    source: Source,
    folder: Path | None,
    *,
    beside: Path | None,
) -> Ledger:
    """The ledger in a folder, on whose disk there is room for it.

    Without one, where a streamed model has nowhere else to put finished blocks, it is in a
    temporary folder, in the one that `beside` is in or in that of the system.
    """
    if folder:
        check_disk(loaded, source, folder)
        return Ledger(folder, fingerprint, loaded.stream)
    ledger = TemporaryLedger(beside and _existing(beside), fingerprint, loaded.stream)
    log.warning(
        "%s is streamed and there is no --out: finished blocks are in %s until the end, and the "
        "run cannot be taken up; name a folder with --out to keep them",
        *(loaded.name, ledger.folder.parent),
    )
    remedy = "name a folder on another disk" if beside else "set TMPDIR to one on another disk"
    check_disk(loaded, source, ledger.folder, remedy)
    return ledger


def check_disk(
    loaded: LoadedModel,
    source: Source,
    folder: Path,
    remedy: str = "name a folder on another disk",
) -> None:
    """Raise UsageError where a disk has no room for what a run will at least write there.

    That is one bit a weight of the blocks and, of a run that calibrates, the hidden states twice:
    each takes the place of the one before once it is complete.
    """
    _, blocks = find_blocks(loaded.model)
    needed = BITS * sum(x.numel() for x in blocks.parameters()) // 8
    if not isinstance(source, HessianStore):
        width = loaded.model.config.get_text_config().hidden_size
        needed += 2 * source.ids.numel() * width * loaded.model.dtype.itemsize
    if needed > (free := shutil.disk_usage(_existing(folder)).free):
        raise UsageError(
            f"{folder}: the run writes at least {needed / GB:.1f} GB there, and {free / GB:.1f} GB "
            f"are free; make room, {remedy}, or give fewer --nsamples"
        )


def _existing(path: Path) -> Path:
    """The nearest folder above a path that there is."""
    return next(above for above in path.absolute().parents if above.is_dir())
