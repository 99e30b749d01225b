"""A team of threads in one process: what its members make is what processes would."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from quip.model.team import Team


class Meeting:
    """Where all members put something, and take what the others put."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.things = size, threading.Barrier(size, timeout=60), {}

    def meet(self, rank: int, thing: Any) -> list[Any]:
        self.things[rank] = thing
        self.barrier.wait()
        found = [self.things[rank] for rank in range(self.size)]
        self.barrier.wait()
        return found


class ThreadTeam(Team):
    """A member of a team of threads, with the calls that tuning and evaluation make."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, meeting.size)
        object.__setattr__(self, "meeting", meeting)

    def hear(self, words: Any) -> list[Any]:
        return self.meeting.meet(self.rank, words)

    def tell(self, words: Any, of: int = 0) -> Any:
        return self.hear(words)[of]

    def spread(self, words: Any, tensors: Any, owner: int, **_: Any) -> tuple[Any, Any]:
        return self.meeting.meet(self.rank, (words, tensors))[owner]

    def largest(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.meeting.meet(self.rank, tensor.clone())).amax(0)

    def exchange(self, pieces: Tensor) -> Tensor:
        found = self.meeting.meet(self.rank, pieces.clone())
        return torch.stack([theirs[self.rank] for theirs in found])


def together(size: int, job: Callable[[Team], Any]) -> list[Any]:
    """What the job returns to each member of a team of so many threads."""
    meeting = Meeting(size)

    def member(rank: int) -> Any:
        try:
            return job(ThreadTeam(rank, meeting))
        except BaseException:
            meeting.barrier.abort()  # nobody is to wait for this one
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(member, r) for r in range(size)]]
