"""The folder of compiled libraries: ours alone, and beside each library its digest.

What lies there is executed, so nobody else may write to it; and a library of which a full disk or
a power cut left a part kills the process that loads it, so its bytes are compared before.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quip.files import put

BUILD = ".build-"  # how the names of folders begin in which something is compiled
HOUR = 3600  # seconds
STARTED = time.time()  # this run


def cache_folder() -> Path:
    """Where compiled libraries are kept: quip/ in XDG_CACHE_HOME or ~/.cache.

    A relative XDG_CACHE_HOME is ignored, as its specification asks: it would mean another folder
    in every directory, and one that came with files of others in some. Raises OSError where there
    is no home either.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise FileNotFoundError(errno.ENOENT, "there is no home folder", base)
    return Path(base) / "quip"


def make_ours(folder: Path) -> Path:
    """The folder, made unless it exists, which from now on nobody else can look into.

    Raises OSError where it cannot be, or where others can have put something in it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise PermissionError(errno.EPERM, "it is a link; delete it", str(folder))
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user", str(folder))
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "others can write to it; delete it", str(folder))
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def fits(library: Path) -> bool:
    """Whether a library is there, as it was when it was kept."""
    try:
        return _beside(library).read_bytes() == _digest(library, library.name)
    except OSError:
        return False


def keep(built: Path, library: Path) -> None:
    """Give a library its name, and its digest after it: until both are there, none fits."""
    digest = _beside(built)
    digest.write_bytes(_digest(built, library.name))
    put(built, library)
    put(digest, _beside(library))


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A folder to compile in, beside what is kept. What killed compilations left goes first."""
    _sweep(folder)
    with tempfile.TemporaryDirectory(
        dir=folder, prefix=BUILD, ignore_cleanup_errors=True
    ) as inside:
        lock = _locked(Path(inside))  # until the process has ended, however it ends
        try:
            yield Path(inside)
        finally:
            if lock is not None:
                os.close(lock)


def _beside(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _digest(library: Path, name: str) -> bytes:
    """A line for sha256sum --check."""
    return f"{hashlib.sha256(library.read_bytes()).hexdigest()}  {name}\n".encode()


def _sweep(folder: Path) -> None:
    """Remove what was being compiled before this run, and is locked by no process any more."""
    for left in folder.iterdir():
        # Older versions lock nothing. A folder as old as this run may be about to be locked.
        before = STARTED if left.name.startswith(BUILD) else STARTED - HOUR
        try:
            found = left.lstat()
        except FileNotFoundError:  # what was being compiled is done
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_mtime < before:
            lock = _locked(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


def _locked(folder: Path) -> int | None:
    """The open folder, if no other process has it locked and the file system has locks."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # swept meanwhile
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        return None
    return opened
