"""How often does the lock of a folder have two holders? Processes that take it as fast as they can.

    python scripts/dev/lock_race.py --races 5000

Prints the count, and ends with 1 if it is not 0.
"""

import argparse
import fcntl
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

from quip.jobs.report.lock import FolderLock


def count_double_holders(folder: Path, *, races: int, processes: int = 4) -> int:
    """How many of so many times that a process held the lock of a folder another did too."""
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    share = -(-races // processes)
    workers = [context.Process(target=_race, args=(folder, share, found)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"exit codes {[worker.exitcode for worker in workers]}: a race failed")
    return sum(found.get() for _ in workers)


def _race(folder: Path, times: int, found: "multiprocessing.SimpleQueue[int]") -> None:
    """Hold the lock so many times; each time a witness, never removed, tells who else does."""
    lock, doubles = FolderLock(folder), 0
    witness = os.open(folder / "witness", os.O_RDWR | os.O_CREAT)
    for _ in range(times):
        while not lock.take():
            pass
        try:
            fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            doubles += 1
        os.sched_yield()  # others try while it is held
        fcntl.flock(witness, fcntl.LOCK_UN)
        lock.release()
    found.put(doubles)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--races", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        doubles = count_double_holders(Path(folder), races=args.races, processes=args.processes)
    print(f"{doubles} of {args.races} races had two holders")
    return int(doubles > 0)


if __name__ == "__main__":
    sys.exit(main())
