"""Processes that are forked from this one, watched, and judged by how they end."""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from quip.packed.digests import bytes_of

FAULTS = ("traceback", "signal", "hang", "memory", "wordy", "different")  # of verdicts
SECONDS = 10.0  # of processor time
WALL = 90.0  # on a machine with other work
BYTES = 1_000_000_000
LONG_LINE = 1100  # of what is said when something is refused
WORKERS = os.cpu_count() or 1


@dataclass
class Child:
    """Something to do in a process of its own, in a folder that is made first and removed after."""

    kind: str  # by what it is counted
    what: str  # for a person who is to repeat it
    folder: Path
    prepare: Callable[[Path], None]
    act: Callable[[Path], Any]  # what must be equal wherever it ends well; JSON
    expected: Any = None
    keep: bool = field(default=False)


def run_all(children: Iterable[Child], workers: int = WORKERS) -> Iterator[tuple[Child, dict]]:
    """Each child and how it ended, in their order."""
    import quip.cli.run
    import quip.jobs.evaluate
    import quip.jobs.run  # noqa: F401  before the forks, so that each is quick

    torch.set_num_threads(1)  # threads do not survive a fork
    running: dict[int, tuple[int, Child, float]] = {}
    ended: dict[int, tuple[Child, dict[str, Any]]] = {}
    queue, given = enumerate(children), 0
    waiting = next(queue, None)
    while waiting or running or ended:
        while waiting and len(running) < workers:
            number, child = waiting
            running[_start(child)] = number, child, time.monotonic()
            waiting = next(queue, None)
        for pid, (number, child, start) in list(running.items()):
            found, status, used = os.wait4(pid, os.WNOHANG)
            if not found and time.monotonic() - start > WALL:
                os.kill(pid, signal.SIGKILL)
                found, status, used = os.wait4(pid, 0)
            if found:
                del running[pid]
                ended[number] = child, _judged(child, status, used)
        while given in ended:
            yield ended.pop(given)
            given += 1
        time.sleep(0.02)


def _start(child: Child) -> int:
    child.folder.mkdir(parents=True)
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        os.chdir(child.folder)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        child.prepare(child.folder)
        resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS) * 2, int(SECONDS) * 2))
        resource.setrlimit(resource.RLIMIT_DATA, (8 * BYTES, 8 * BYTES))
        before = resource.getrusage(resource.RUSAGE_SELF)
        try:
            value, code = child.act(child.folder), 0
            Path("value.json").write_text(json.dumps(value))
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(bool(ending.code))
        after = resource.getrusage(resource.RUSAGE_SELF)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        Path("seconds").write_text(str(spent))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _judged(child: Child, status: int, used: Any) -> dict[str, Any]:
    said = _text(child.folder / "stderr")
    seconds = float(_text(child.folder / "seconds") or used.ru_utime + used.ru_stime)
    value = _text(child.folder / "value.json")
    ended = {
        "verdict": _verdict(child, status, said, seconds, used.ru_maxrss * 1024, value),
        "seconds": seconds,
        "bytes": used.ru_maxrss * 1024,
        "said": said.splitlines(),
    }
    if damage := _text(child.folder / "damage"):
        child.what += f": {damage}"
    if not child.keep:
        shutil.rmtree(child.folder, ignore_errors=True)
    return ended


def _verdict(child: Child, status: int, said: str, seconds: float, size: int, value: str) -> str:
    if seconds > SECONDS or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        return "hang"
    if os.WIFSIGNALED(status):
        return "signal"
    if "Traceback (most recent call last)" in said:
        return "traceback"
    if size > BYTES:
        return "memory"
    if os.WEXITSTATUS(status):
        lines = said.splitlines()  # progress, warnings and the one line that says what is wrong
        reasons = sum(line.startswith("quip: ") for line in lines)
        wordy = reasons > 1 or any(len(line) > LONG_LINE for line in lines)
        return "wordy" if wordy or not lines else "refused"
    if child.expected is None:
        return "done"
    return "equal" if json.loads(value) == child.expected else "different"


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def command(*words: str) -> None:
    """A command of quip in this process. Raises SystemExit where it fails."""
    from quip.cli import main

    if status := main(list(words)):
        raise SystemExit(status)


def content(file: Path) -> str:
    """A digest of the tensors of a safetensors file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
