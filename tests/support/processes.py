"""A team of processes that torch.distributed joins: copies of this one, which import nothing."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryFile
from typing import IO, Any

from torch.distributed import TCPStore

from quip.model.team import Team, joined

PATIENCE = 90.0  # seconds for a team, on a machine with other work
ALONE = 30.0  # seconds for the others, once one has failed


def in_team(size: int, job: Callable[[Team], Any], *, exact: bool = True) -> list[Any]:
    """What the job, whose result can be pickled, returns to each process of a team of this size.

    A process that fails returns its exception.
    """

    def member() -> Any:
        with joined(exact=exact) as team:
            return job(team)

    return in_processes(size, member)


def in_processes(size: int, job: Callable[[], Any]) -> list[Any]:
    """What a job that joins its team itself returns to each of so many processes.

    A copy of a process with threads may stand still, for what they held when it was made. Where no
    one of a team has said anything in time, a warning says where they stand, and there is another.
    """
    with TemporaryFile("w+") as stacks:
        found = _started(size, job, stacks)
        if all(isinstance(one, TimeoutError) for one in found):
            stacks.seek(0)
            warnings.warn(f"all {size} processes stood still:\n{stacks.read()}", stacklevel=2)
            found = _started(size, job, stacks)
        return found


def _started(size: int, job: Callable[[], Any], stacks: IO[str]) -> list[Any]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's
    fork, members = multiprocessing.get_context("fork"), []
    for rank in range(size):
        ours, theirs = fork.Pipe(duplex=False)
        own = rank, size, store.port, job, theirs, stacks
        process = fork.Process(target=_member, args=own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside idle threads
            process.start()
        theirs.close()
        members.append((process, ours))
    try:
        return _results([ours for _, ours in members])
    finally:
        for process, ours in members:
            if process.is_alive() and not ours.poll():
                os.kill(process.pid or 0, signal.SIGUSR1)  # writes down where it stands
                process.join(1)
            process.kill()
            process.join()


def _results(pipes: Sequence[Connection]) -> list[Any]:
    """What each process has to say, or the exception that says why it says nothing."""
    found, end = dict[Connection, Any](), time.monotonic() + PATIENCE
    while silent := [pipe for pipe in pipes if pipe not in found]:
        for pipe in wait(silent, max(0.0, end - time.monotonic())) or silent:
            found[pipe] = _result(pipe)
            if isinstance(found[pipe], BaseException):
                end = min(end, time.monotonic() + ALONE)
    return [found[pipe] for pipe in pipes]


def _result(pipe: Connection) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll() else TimeoutError()
    except EOFError as error:
        return error


def _member(
    rank: int,
    size: int,
    port: int,
    job: Callable[[], Any],
    theirs: Connection,
    stacks: IO[str],
) -> None:
    faulthandler.register(signal.SIGUSR1, stacks)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        found = job()
    except BaseException as error:
        found = error
    theirs.send_bytes(pickle.dumps(found))  # by value: tensors would be handed over as files
