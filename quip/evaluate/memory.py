"""Peak memory of a stretch of work, and the bytes that a module holds."""

import re
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quip.errors import UsageError

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(kw_only=True)
class Memory:
    """Bytes of tensors on a CUDA device, or resident bytes of this whole process on the CPU.

    The work itself took peak_bytes - start_bytes. On the CPU that is a lower bound: what Python
    and the C library had freed but kept counts in both.
    """

    start_bytes: int
    peak_bytes: int  # while the work runs: start_bytes
    since_process_start: bool  # the system's mark could not be reset: the peak may be older


@contextmanager
def measured(device: torch.device | str) -> Iterator[Memory]:
    """The peak of `with measured(device) as memory: ...`, known when the block is left.

    A device and a process have one high-water mark each, and it is reset here: measurements do
    not nest, and what else reads the mark (`ru_maxrss` does) sees the peak since the reset.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"memory is measured on cpu and cuda, not on {device}")
    memory = _start_on_cuda(device) if device.type == "cuda" else _start_on_host()
    try:
        yield memory
    finally:
        if device.type == "cuda":
            memory.peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            # The kernel's two counters may differ by some pages.
            memory.peak_bytes = max(memory.start_bytes, _host_bytes()["VmHWM"])


def _start_on_cuda(device: torch.device) -> Memory:
    torch.cuda.init()  # else there is no mark to reset before the first tensor
    torch.cuda.reset_peak_memory_stats(device)
    now = torch.cuda.memory_allocated(device)
    return Memory(start_bytes=now, peak_bytes=now, since_process_start=False)


def _start_on_host() -> Memory:
    try:
        CLEAR_REFS.write_text("5")  # proc(5): 5 resets the peak resident set size
        reset = True
    except OSError:
        reset = False  # not Linux, or not permitted, as in some containers
    now = _host_bytes()["VmRSS"]
    return Memory(start_bytes=now, peak_bytes=now, since_process_start=not reset)


def process_peak() -> int:
    """Peak resident bytes of this process, since its start or since `measured` reset the mark."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Resident bytes of this process now; where the system has no /proc, their peak."""
    return _host_bytes()["VmRSS"]


def _host_bytes() -> dict[str, int]:
    """VmRSS, the resident bytes now, and VmHWM, their peak; without /proc the peak is both."""
    peak = process_peak()
    found = {"VmRSS": peak, "VmHWM": peak}
    if STATUS.exists():
        lines = re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
        found |= {name: int(kilobytes) * 1024 for name, kilobytes in lines}
    return found


def module_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers; a storage that several share is counted once, whole."""
    return tensor_bytes((*module.parameters(), *module.buffers()))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of these tensors; one that several share is counted once, whole."""
    storages = [t.untyped_storage() for t in tensors]
    # Not by address: that of every tensor on the meta device is 0.
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
