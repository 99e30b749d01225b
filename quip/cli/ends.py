"""Processes that torchrun started: what ends one of them ends all, and is said once.

A process that is told to end, by its lines (quip/cli/lines.py) or by torchrun, clears up as after
Ctrl-C. While it computes or waits inside a library it cannot: GRACE seconds later it ends anyway.
"""

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import NoReturn, TextIO

from quip.cli import ranks
from quip.cli.lines import MOMENT, End, Lines
from quip.cli.streams import complain
from quip.errors import one_line

GRACE = 8.0  # seconds: torchrun kills after 30
TERMINATED = 128 + signal.SIGTERM
FAR = ("gloo", "nccl", "socket", "store", "peer")  # in what libraries say of a process out of reach

Tell = Callable[[str, int], None]  # why the command ends, for people, and its exit status


class Ended(BaseException):
    """The team is at its end, as others say: like KeyboardInterrupt no Exception."""


def ranked(run: Callable[[Tell], int]) -> int:
    """The exit status of a command that tells why it fails; in a team it ends when all are to."""
    size = ranks.size()
    if size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return run(lambda why, _: say(why))
    try:
        process = Process(int(os.environ["RANK"]), size)
    except (OSError, RuntimeError) as error:
        say(f"the processes cannot meet ({one_line(error)}); let no firewall be between them")
        return 1
    try:
        process.begin()
        status = run(process.fail)
    except Ended:
        status = process.leave()
    except Exception as error:
        status = process.crash(error)
    if status == 0:
        process.done()
    else:
        atexit.register(_leave, status)
    return status


def _leave(status: int) -> NoReturn:
    """End the process before torch does, which aborts one that is still in a group."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


class Process:
    """One process of a team."""

    def __init__(self, rank: int, size: int) -> None:
        self._leaving, self._terminal = False, sys.stderr  # wherever that leads later
        tell = partial(say, to=self._terminal)
        self._lines = Lines(rank, size, say=tell, ended=self._interrupt)
        signals, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._terminate)
        threading.Thread(target=self._expect, args=(signals,), daemon=True).start()

    def begin(self) -> None:
        """From now on `Ended` is raised where the team is to end, be it at once."""
        self._lines.watch()

    def fail(self, why: str, status: int) -> None:
        """End the team, for a reason that is said once."""
        self._leaving = True
        self._lines.fail(End(why, status))

    def crash(self, error: Exception) -> int:
        """End the team for what is no error of a user, unless others have ended it before.

        A collective fails whose other end has gone, before it is known why that has.
        """
        self._leaving = True
        text = one_line(error)
        if any(word in text.lower() for word in FAR):
            if not self._lines.wait(5 * MOMENT):
                self._lines.fail(End(f"the processes lost each other ({text})", 1))
        else:
            traceback.print_exception(error, file=self._terminal)
            self._lines.fail(End(f"{type(error).__name__}: {text}", 1, said=True))
        return 1

    def leave(self) -> int:
        """After Ended: wait until it is known why; where nobody says, it was a SIGTERM."""
        if not self._lines.wait(5 * MOMENT):
            self._lines.fail(End("terminated", TERMINATED))
        return self._lines.end.status if self._lines.end else TERMINATED

    def done(self) -> None:
        """The others go on without this process, which has done its work."""
        self._leaving = True
        self._lines.done()

    def _interrupt(self) -> None:
        """Let the main thread end, unless it does already."""
        if not self._leaving:
            os.kill(os.getpid(), signal.SIGTERM)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if not self._leaving:  # what clears up is not interrupted again
            self._leaving = True
            raise Ended(self._lines.end.why if self._lines.end else "terminated")

    def _expect(self, signals: int) -> NoReturn:
        """See to it that the process ends once it was asked to, whatever it is doing."""
        os.read(signals, 1)  # also while the main thread is inside a library
        time.sleep(GRACE)
        self._lines.fail(End("terminated", TERMINATED))
        os._exit(TERMINATED)


def say(why: str, *, to: TextIO | None = None) -> None:
    complain(f"quip: {why}", to=to)
