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
def resident(
    block: nn.Module, device: torch.device | str, *, home: torch.device
) -> Iterator[nn.Module]:
    """The block is on the device inside the `with`, and then at home (usually the host).

    The one place that moves blocks: of a model that is walked over, one is on the device at a time.
    """
    try:
        yield block.to(device)
    finally:
        block.to(home)


@contextmanager
def placed(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """The model is on the device inside the block, then back where it was."""
    with resident(model, device, home=next(model.parameters()).device):
        yield
