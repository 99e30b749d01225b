"""Files and folders that appear under their name only when they are complete.

Complete is what a power cut leaves complete: bytes are on the disk before a name leads to them,
and the name is before what it replaces goes. All that is written has the mode of the umask.
"""

import csv
import errno
import glob
import os
import platform
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from safetensors import SafetensorError

from quip.errors import Unavailable, UsageError


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Another path to write a file to, which takes the name's place when the block ends well.

    Raises Unavailable where the disk does not take it (full, read-only).
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        with writing(final):
            mode = _mode_of_new(partial)
            yield partial
            partial.chmod(mode)
            put(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def put(file: Path, final: Path) -> None:
    """Give a complete file its name, and both to the disk."""
    sync(file)
    os.replace(file, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    # A folder may be written to and not read, and some network file systems sync no folders.
    passed = (errno.EACCES, errno.EINVAL, errno.ENOTSUP) if path.is_dir() else ()
    try:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in passed:
            raise


def make_folder(path: Path, *, exist_ok: bool = True) -> None:
    """A folder and those above it that are missing; their names are on the disk."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=exist_ok)
    for made in missing:
        sync(made.parent)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows of the same keys, in their order, under a line of the keys."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def new_folder(final: Path, *, overwrite: bool) -> Iterator[Path]:
    """Another path to make a folder at, which becomes `final` when the block ends well.

    If `final` came to hold files meanwhile and is not to be overwritten, the folder gets the
    next free name (final-2 ...) and Unavailable says so: what was computed is not lost.
    """
    place = final.resolve()  # "." and ".." are no names to replace, and links stay links
    partial = _ours(place, "partial")
    _clear_away(place)
    try:
        with writing(final):
            make_folder(partial, exist_ok=False)
            yield partial
            complete(partial)
            _take_place(partial, place, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong with the disk, as one line."""
    try:
        yield
    except Exception as error:
        # tokenizers raises a bare Exception, which tells by its text alone that it is of the disk.
        if not (isinstance(error, OSError | SafetensorError) or "(os error " in str(error)):
            raise
        reason = getattr(error, "strerror", None) or error
        raise Unavailable(
            f"{path} cannot be written ({reason}); make room, or name another place"
        ) from error


def check_new(path: Path, flag: str, *, overwrite: bool) -> None:
    """Raises UsageError for a folder that cannot be made, or that holds files not to be lost."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{flag} {path}: it is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(
            f"{flag} {path}: it exists and is not empty; name another folder or add --overwrite"
        )
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UsageError(f"{flag} {path}: {above} is no folder that can be written to")


def _mode_of_new(path: Path) -> int:
    """What a new file gets here. Some writers, such as that of safetensors, give 0600 instead."""
    path.unlink(missing_ok=True)  # nothing is written through a link that waits there
    path.touch(exist_ok=False)
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def complete(folder: Path) -> None:
    """Give all files of a folder the mode of new ones, and send all there is to the disk."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # of the umask, as the folder's own
    for path, _, names in os.walk(folder, topdown=False):
        for file in (Path(path, name) for name in names):
            file.chmod(mode)
            sync(file)
        sync(Path(path))


def _take_place(partial: Path, final: Path, *, overwrite: bool) -> None:
    old = _ours(final, "old")
    aside = overwrite and final.is_dir()
    try:
        if aside:
            os.replace(final, old)
        os.replace(partial, final)  # over an empty folder too
    except OSError as error:
        if aside and not final.exists():
            os.replace(old, final)
        kept = keep_aside(partial, final)
        raise Unavailable(
            f"{final} cannot be written ({error.strerror or error}); "
            f"what was to go there is in {kept}"
        ) from error
    sync(final.parent)
    if aside:
        shutil.rmtree(old, ignore_errors=True)


def _ours(place: Path, kind: str, number: int | str | None = None) -> Path:
    """A name beside a folder that no other process uses."""
    number = os.getpid() if number is None else number
    return place.with_name(f".{place.name}.{kind}-{platform.node()}-{number}")


def _clear_away(place: Path) -> None:
    """What processes left behind that were killed: half a folder, or one that was moved aside."""
    for kind in ("partial", "old"):
        prefix = _ours(place, kind, "").name
        for left in place.parent.glob(f"{glob.escape(prefix)}*"):
            if runs(left.name.removeprefix(prefix)):
                continue
            if kind == "old" and not place.exists():
                os.replace(left, place)  # killed before the new one was in its place
            else:
                shutil.rmtree(left, ignore_errors=True)


def runs(number: str) -> bool:
    """Whether another process of this machine has the number."""
    if not number.isdecimal() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def keep_aside(partial: Path, final: Path) -> Path:
    """Where a folder is put that cannot take its place: the first free one of final-2, final-3."""
    names = (final.with_name(f"{final.name}-{n}") for n in count(2))
    kept = next(name for name in names if not name.exists())
    os.replace(partial, kept)
    sync(kept.parent)
    return kept
