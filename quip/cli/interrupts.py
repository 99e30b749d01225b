"""Ctrl-C that is remembered: libraries being imported may take it for a failure of their own."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Interrupts:
    """Whether Ctrl-C came while the block runs, whatever became of its KeyboardInterrupt."""

    def __init__(self) -> None:
        self.came = False

    def note(self, number: int, frame: FrameType | None) -> NoReturn:
        """Handle the signal as Python does, and remember it."""
        self.came = True
        raise KeyboardInterrupt

    def forget(self) -> None:
        """Let the command go on: what Ctrl-C was meant for is smaller, and has been stopped."""
        self.came = False


INTERRUPTS = Interrupts()  # a process has one handler of a signal


@contextmanager
def noticed() -> Iterator[Interrupts]:
    """Notice Ctrl-C inside the block. Where another handler is at work, that one stays."""
    INTERRUPTS.forget()
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, INTERRUPTS.note)
    try:
        yield INTERRUPTS
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
