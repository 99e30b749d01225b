"""The one way to print: no encoding makes it fail; a reader who left ends the command quietly."""

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from quip.errors import Unavailable


class ReaderLeft(Exception):
    """Whoever read standard output has closed it, as `head` does: nothing more is wanted."""


def set_up_streams() -> None:
    """Let both streams write any text: what an encoding lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # `quip ... >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str = "", *, end: str = "\n") -> None:
    """Print to standard output, at once.

    Raises ReaderLeft where nobody reads it, and Unavailable where it cannot be written.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError as error:
        _swallow_the_rest()
        raise ReaderLeft from error
    except OSError as error:
        _swallow_the_rest()
        raise Unavailable(
            f"standard output cannot be written ({error.strerror or error}); make room, or send it "
            "elsewhere"
        ) from error


def complain(text: str, *, to: TextIO | None = None) -> None:
    """Print a line to standard error, or `to` what that was before, if anybody reads it."""
    with suppress(OSError):
        print(text, file=to or sys.stderr, flush=True)


def _swallow_the_rest() -> None:
    """Send what is still buffered to nowhere: Python would complain of it while it shuts down."""
    with suppress(OSError, ValueError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
