"""Lines between the processes of a team: when one of them ends early, all others learn of it.

torchrun ends the processes of its own machine when one of them fails. Those of other machines would
go on, and then wait for it. So process 0 has a line to each of the others, a connection that the
kernel closes when a process is killed, whatever it was doing; where a machine is gone, the lines to
it go dead within half a minute.

    secret, rank, name    the first words of another process to process 0
    why, status, said     what ended a process; from process 0, what ended all of them
    done                  that the line ends means nothing

Process 0 waits a moment for what others have to say. What it says itself, as when all were asked
for the same nonsense, is no matter of one process; anything else bears the name of whose it is.
"""

import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from quip.cli.meeting import COME, kept_alive, listen, meet

INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C, which is meant for all
MOMENT = 0.4  # seconds in which several processes may say the same
WORD = 2**16  # bytes that are heard at once
LOST = "it ended without a word, as one does that is killed, or for which there is no memory"


@dataclass(frozen=True)
class End:
    """What ended a process, or all: a line, an exit status, and whether people have read it."""

    why: str
    status: int
    said: bool = False


@dataclass(eq=False)
class _Line:
    """A connection to a process, and what is half heard from it; it bears its name when known."""

    socket: socket.socket
    rank: int = -1
    name: str = ""
    heard: bytes = b""
    done: bool = False

    def tell(self, **words: Any) -> None:
        with suppress(OSError):  # its end is noticed where lines are watched
            self.socket.sendall(json.dumps(words).encode() + b"\n")


class Lines:
    """The lines of one process, once they are watched.

    When the team is to end, `end` says why, and `ended` is called.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        say: Callable[[str], None],
        ended: Callable[[], None],
    ) -> None:
        """Raises OSError or RuntimeError where process 0 does not come, or cannot be reached."""
        self._rank, self._size, self._say, self._ended = rank, size, say, ended
        self._name = f"process {rank} ({socket.gethostname()}, pid {os.getpid()})"
        self.end: End | None = None
        self._over = threading.Event()
        self._heard: list[tuple[int, str, End]] = []  # whose end, and what it was, as it came
        self._seen, self._parent, start = {rank}, os.getppid(), time.monotonic()
        self._expected, self._settled = start + COME.total_seconds(), start
        self._selector, self._lines = selectors.DefaultSelector(), list[_Line]()
        if rank == 0:
            self._listener, self._secret = listen()
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        else:
            connection, secret = meet()
            self._add(_Line(connection, rank=0, name="process 0"))
            self._tell(secret=secret, rank=rank, name=self._name)

    def watch(self) -> None:
        """From now on, learn of the others' ends, and call `ended` once."""
        threading.Thread(target=self._watch, daemon=True, name="lines").start()

    def fail(self, end: End) -> None:
        """Say what ended this process, and wait until all know; where nobody can, say it here."""
        self._hear(self._rank, self._name, end)
        if not self.wait(10 * MOMENT) and not end.said:
            self._say(end.why)

    def done(self) -> None:
        """From now on it means nothing that this process ends."""
        self._tell(done=True)

    def wait(self, seconds: float) -> bool:
        """Whether the team is to end, once that is known, or so many seconds later."""
        return self._over.wait(seconds)

    def _tell(self, **words: Any) -> None:
        for line in list(self._lines):
            line.tell(**words)

    def _accept(self) -> None:
        with suppress(OSError):
            self._add(_Line(kept_alive(self._listener.accept()[0])))

    def _add(self, line: _Line) -> None:
        self._lines.append(line)
        self._selector.register(line.socket, selectors.EVENT_READ, lambda: self._listen_to(line))

    def _watch(self) -> None:
        while not self._over.is_set():
            for key, _ in self._selector.select(timeout=MOMENT / 4):
                key.data()
            if os.getppid() != self._parent:
                self._hear(self._rank, self._name, End("torchrun was killed", 1))
            if self._rank == 0:
                self._settle(time.monotonic())

    def _listen_to(self, line: _Line) -> None:
        heard = b""
        with suppress(OSError):
            heard = line.socket.recv(WORD)
        *words, line.heard = (line.heard + heard).split(b"\n")
        with suppress(ValueError, KeyError, TypeError):  # of whoever else found the port
            for word in words:
                self._take(line, json.loads(word))
        if not heard or len(line.heard) > WORD:
            self._selector.unregister(line.socket)
            self._lines.remove(line)
            line.socket.close()
            if line.name and not line.done:
                self._hear(line.rank, line.name, End(LOST, 1))

    def _take(self, line: _Line, words: dict[str, Any]) -> None:
        if not line.name:
            if words.get("secret") == self._secret:
                line.rank, line.name = words["rank"], words["name"]
                self._seen.add(line.rank)
        elif "done" in words:
            line.done = True
        else:
            self._hear(line.rank, line.name, End(**words))

    def _hear(self, rank: int, name: str, end: End) -> None:
        """Learn what ended a process, or from process 0 what ended all."""
        if not self._heard:
            self._settled = time.monotonic() + MOMENT
        self._heard.append((rank, name, end))
        if self._rank and rank == self._rank:
            self._tell(**asdict(end))
        elif self._rank:
            if end.why == LOST:
                end = End(f"{name}: {LOST}", 1, said=self._rank > 1)  # process 1 stands in for it
            self._finish(end)

    def _settle(self, now: float) -> None:
        """Once it is known what ended one, and a moment has passed: say it, and tell all."""
        missing = {*range(self._size)} - self._seen
        if now > self._expected and missing:
            self._hear(0, self._name, End(f"process {min(missing)} did not start in time", 1))
        if not self._heard or now < self._settled:
            return
        _, name, end = self._heard[0]
        ours = any(other.why == end.why for one, _, other in self._heard if one == 0)
        why = end.why if ours or end.status == INTERRUPTED else f"{name}: {end.why}"
        self._finish(replace(end, why=why))

    def _finish(self, end: End) -> None:
        self.end = end
        if not end.said:
            self._say(end.why)
        if self._rank == 0:  # once it is said, and before this process goes on, and may be gone
            self._tell(**asdict(replace(end, said=True)))
        self._over.set()
        self._ended()
