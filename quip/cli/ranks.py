"""Commands that torchrun starts several times over: one process speaks for all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NoReturn

from quip.errors import UsageError

# Commands whose processes work together
SHARED = ("run", "hessians", "plan", "evaluate", "finetune")


def size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return size() == 1 or os.environ.get("RANK", "0") == "0"


def can_share(command: str) -> bool:
    """Whether the processes that were started can do a command together."""
    return command in SHARED or size() == 1


def refuse(command: str, _args: object) -> NoReturn:
    """Raise UsageError for a command that is done by one process."""
    raise UsageError(
        f"quip {command} is done by one process, and torchrun started {size()}; start it "
        "without torchrun"
    )


@contextmanager
def quiet_others() -> Iterator[None]:
    """Inside the block, what processes but the first print goes nowhere, and so do their bars."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
