"""Lines between processes, here of one process: who ends, who learns of it, and who says it."""

import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from quip.cli import lines as module
from quip.cli.lines import INTERRUPTED, LOST, MOMENT, End, Lines

PATIENCE = 20 * MOMENT  # seconds that a test waits for what takes one or two moments


class Members:
    """A team of so many processes, what each of them said, and which were told to end."""

    def __init__(self, size: int, here: int) -> None:
        self.said: list[tuple[int, str]] = []
        self.ended: list[int] = []
        self.lines = [self._member(rank, size) for rank in range(here)]

    def _member(self, rank: int, size: int) -> Lines:
        found = Lines(
            rank,
            size,
            say=lambda why: self.said.append((rank, why)),
            ended=lambda: self.ended.append(rank),
        )
        found.watch()
        return found

    def hang_up(self, rank: int) -> None:
        """What the kernel does to the lines of a process that is killed."""
        for line in list(self.lines[rank]._lines):
            with suppress(OSError):  # it may have been closed meanwhile
                line.socket.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def team(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    made = []

    def make(size: int = 3, here: int | None = None) -> Members:
        made.append(Members(size, here or size))
        return made[-1]

    yield make
    for members in made:
        for lines in members.lines:
            lines._over.set()  # which ends its thread


def ends(members: Members, ranks: list[int]) -> list[End | None]:
    assert all(members.lines[rank].wait(PATIENCE) for rank in ranks)
    return [members.lines[rank].end for rank in ranks]


def name(rank: int) -> str:
    return f"process {rank} ({socket.gethostname()}, pid {os.getpid()})"


def test_what_ends_one_is_said_once_by_the_first_with_the_name_of_whose_it_is(team):
    members = team()
    members.lines[2].fail(End("no such file", 2))
    why = f"{name(2)}: no such file"
    assert ends(members, [0, 1, 2]) == [End(why, 2), End(why, 2, True), End(why, 2, True)]
    assert members.said == [(0, why)]
    assert sorted(members.ended) == [0, 1, 2]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_what_all_say_is_said_once_and_is_nobodys(team, order):
    members = team()
    threads = [
        threading.Thread(target=members.lines[rank].fail, args=(End("no such flag", 2),))
        for rank in order
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert members.said == [(0, "no such flag")]


def test_ctrl_c_is_nobodys_and_what_was_said_is_not_said_again(team):
    members = team()
    members.lines[1].fail(End("interrupted", INTERRUPTED))
    assert members.said == [(0, "interrupted")]
    members = team()
    members.lines[1].fail(End("KeyError: 3", 1, said=True))
    assert ends(members, [2])[0] == End(f"{name(1)}: KeyError: 3", 1, said=True)
    assert members.said == []


def test_a_process_that_hangs_up_was_killed(team):
    members = team()
    members.hang_up(1)
    assert ends(members, [0, 2])[0].why == f"{name(1)}: {LOST}"
    assert [rank for rank, _ in members.said if rank != 1] == [0]


def test_where_the_first_hangs_up_the_second_says_so(team):
    members = team()
    members.hang_up(0)
    found = ends(members, [1, 2])
    assert [end.status for end in found] == [1, 1]
    assert [(rank, why) for rank, why in members.said if rank] == [(1, f"process 0: {LOST}")]


def test_after_their_work_is_done_processes_may_hang_up(team):
    members = team()
    for lines in members.lines:
        lines.done()
    for rank in (2, 0):
        members.hang_up(rank)
    assert not any(lines.wait(2 * MOMENT) for lines in members.lines)
    assert members.said == members.ended == []


def test_strangers_are_not_listened_to(team):
    members = team()
    place = members.lines[0]._listener.getsockname()[1]
    for words in (
        b"GET / HTTP/1.1\n\n",
        b'{"secret": "guess", "rank": 1, "name": "x"}\n',
        b"\xff\n",
    ):
        with socket.create_connection(("127.0.0.1", place)) as stranger:
            stranger.sendall(words + b'{"why": "hacked", "status": 1, "said": false}\n')
    assert not members.lines[0].wait(2 * MOMENT)
    members.lines[1].fail(End("its own", 1))
    assert members.said == [(0, f"{name(1)}: its own")]


def test_a_process_that_never_starts_is_named(team, monkeypatch):
    monkeypatch.setattr(module, "COME", timedelta(seconds=MOMENT))
    members = team(3, here=2)
    assert ends(members, [0, 1])[0].why == "process 2 did not start in time"


def test_processes_end_when_torchrun_was_killed(team, monkeypatch):
    members = team()
    time.sleep(MOMENT)
    monkeypatch.setattr(module.os, "getppid", lambda: 1)
    ends(members, [0, 1, 2])
    assert members.said == [(0, "torchrun was killed")]
