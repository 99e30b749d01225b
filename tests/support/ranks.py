"""Processes as torchrun starts them, on machines of their own: nobody ends those that are left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
PATIENCE = 240  # seconds, on a machine that does other things too


@dataclass
class Ended:
    """What became of the processes."""

    statuses: list[int]
    said: list[list[str]]  # by each, on standard error


class Ranks:
    """`quip` WORDS in each of several processes of a team. Inside the context they run."""

    def __init__(
        self,
        *lines: Sequence[object],
        folder: Path,
        homes: Sequence[Path] = (),  # the working directory of each; folder, if not said
        environments: Sequence[Mapping[str, str]] = ({}, {}, {}),
        prepare: Callable[[], None] | None = None,  # in process 0, before it begins
    ) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._logs = [folder / f"said-{rank}.txt" for rank in range(len(lines))]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "quip", *map(str, words)],
                stdout=subprocess.DEVNULL,
                stderr=log.open("w"),
                env=self._environment(rank, len(lines)) | environments[rank],
                preexec_fn=prepare if rank == 0 else None,
                cwd=homes[rank] if homes else folder,
            )
            for rank, (words, log) in enumerate(zip(lines, self._logs, strict=True))
        ]

    def _environment(self, rank: int, size: int) -> dict[str, str]:
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        return os.environ | own

    def wait_for(self, path: Path) -> None:
        """Until the processes have written this."""
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            assert time.monotonic() < deadline, "it never comes"
            assert all(one.poll() is None for one in self.processes), self.ended()
            time.sleep(0.01)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, number)

    def ended(self) -> Ended:
        """Once all have ended."""
        statuses = [one.wait(PATIENCE) for one in self.processes]
        return Ended(statuses, [log.read_text().splitlines() for log in self._logs])

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.processes:
            one.kill()
            one.wait()
