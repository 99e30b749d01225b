"""A lock on a folder: one process holds it at a time, and none when that process has ended.

The file .lock is there while the lock is held, and goes with it. So the lock of a process that
waited at the file while it went is on a file without a name, and keeps nobody out: a lock counts
only if the name still leads to the file that was locked.
"""

import fcntl
import os
from pathlib import Path

LOCK = ".lock"  # after a kill it may be there, but is not locked


class FolderLock:
    """The lock of a folder that exists, as one process sees it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._opened: int | None = None

    @property
    def held(self) -> bool:
        return self._opened is not None

    def take(self) -> bool:
        """Whether the lock is held now, by this process and no other. Raises OSError where
        nothing can be locked."""
        while not self.held:
            opened = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            locked, named = _lock(opened), self._names(opened)
            if locked and named:
                self._opened = opened
                break
            os.close(opened)
            if named:
                return False
        return True

    def release(self) -> None:
        """Let others in. The end of the process, however it comes, does the same."""
        if self._opened is not None:
            if self._names(self._opened):  # and not a file of those who deleted the folder
                self.path.unlink(missing_ok=True)
            os.close(self._opened)
            self._opened = None

    def _names(self, opened: int) -> bool:
        """Whether the path leads to this open file."""
        try:
            return os.path.samestat(os.fstat(opened), self.path.lstat())
        except FileNotFoundError:
            return False


def _lock(opened: int) -> bool:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        os.close(opened)
        raise
    return True
