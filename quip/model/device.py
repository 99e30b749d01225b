"""Where to compute."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from quip.errors import UsageError


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


@contextmanager
def placed(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """The model is on the device inside the block, then back where it was."""
    home = next(model.parameters()).device
    try:
        model.to(device)
        yield
    finally:
        model.to(home)
