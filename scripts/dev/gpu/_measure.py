"""What the sections of scripts/bench_gpu.py share: their arguments, timing, and rows."""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch


def device() -> torch.device:
    """The device that scripts/bench_gpu.py names; a CPU means a dry run at tiny sizes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    found = torch.device(parser.parse_args().device)
    if found.type == "cpu":
        torch.set_num_threads(1)  # at tiny sizes others only wait for each other
    return found


def emit(**row: object) -> None:
    """Print a row of the section, at once."""
    print(json.dumps(row), flush=True)


def milliseconds(call: Callable[[], object], *, repeats: int = 5, warm: bool = True) -> float:
    """The median time of a call until the device is done, with what the host needs to launch it."""
    if warm:
        call()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 4)


def synchronize() -> None:
    """Wait until a CUDA device has done all it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
