"""Where to compute."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import nn

from quip.errors import UsageError, one_line

agreed: ContextVar[int | None] = ContextVar("agreed", default=None)  # free bytes, in a team


def choose_device(name: str | None) -> str:
    """The device asked for, or cuda if there is one. Raises UsageError if it cannot compute."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        if "device type at start of device string" in reason:
            reason = "no such kind of device"
        raise UsageError(f"--device {name}: {reason}; say cpu, or leave it out") from error
    return name


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nothing holds; of one that is no CUDA device, without end."""
    if device.type != "cuda":
        return sys.maxsize
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def free_host_bytes() -> int:
    """Memory of this machine that programs can have without others losing theirs.

    Processes of a team, which have to decide alike by it, hear what the one with the least had of
    it when they met.
    """
    if (free := agreed.get()) is not None:
        return free
    with suppress(OSError):  # where there is no such file, as on a Mac
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def release_freed() -> None:
    """Give the system the memory of this process that it holds for objects to come.

    The library of GNU/Linux keeps what lies between objects that live on: some 300 MB after text
    was tokenized. Others have no such call, and are left alone.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def having(free: int) -> Iterator[None]:
    """Inside the block `free_host_bytes` says so many."""
    token = agreed.set(free)
    try:
        yield
    finally:
        agreed.reset(token)


@contextmanager
def enough_memory(what: str, remedy: str) -> Iterator[None]:
    """Raises UsageError, in one line with the remedy, where a device runs out of memory inside."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"{what}: {one_line(error)}; {remedy}") from error


@contextmanager
def resident(
    block: nn.Module, device: torch.device | str, *, home: torch.device
) -> Iterator[nn.Module]:
    """The block is on the device inside the `with`, and then at home (usually the host).

    Of a model that is walked over, quip/model/ferry.py moves the blocks.
    """
    try:
        yield block.to(device)
    finally:
        block.to(home)


@contextmanager
def placed(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """The model is on the device inside the block, then back where it was."""
    home = next(model.parameters()).device
    with (
        enough_memory(f"the model on {device}", "free the device, or say --device cpu"),
        resident(model, device, home=home),
    ):
        yield
