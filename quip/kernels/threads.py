"""The threads of torch, for C++ that has none of its own.

torch computes with a pool of OpenMP. A second pool beside it would fight it for the cores, so
that threads.h enters the one that is there, by the address of its entry point.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

POOLS = ("libgomp", "libiomp5", "libomp")  # all of them have the entry point of the first
MAPS = Path("/proc/self/maps")  # the libraries of this process; Linux alone has it


FIELDS = (("parallel", ctypes.c_void_p), ("thread_count", ctypes.c_int64))  # Threads of threads.h


def threads() -> tuple[int | None, int]:
    """As many as torch uses, for the last FIELDS of a struct; without a pool the caller's own."""
    return _entry(), torch.get_num_threads()


@cache
def _entry() -> int | None:
    """Where GOMP_parallel begins in the library of torch's pool."""
    try:
        lines = os.fsdecode(MAPS.read_bytes()).splitlines()
    except OSError:  # there are none, or a sandbox hides them
        lines = []
    paths = {line[line.index("/") :] for line in lines if "/" in line}
    pools = [path for path in map(Path, paths) if path.name.startswith(POOLS)]
    home = Path(torch.__file__).parent
    for path in sorted(pools, key=lambda path: home not in path.parents):  # torch's own first
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError, UnicodeError):  # ctypes cannot say which path failed
            continue
    return None
