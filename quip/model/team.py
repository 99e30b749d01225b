"""Processes that do one job together: windows are shared out, sums exact, results spread.

torchrun starts them, torch.distributed carries tensors and words as JSON between them: gloo those
of the host, NCCL those of CUDA devices. Each call of a `Team` is made by all of its processes, in
the same order; in a team of one it gives back what it was given.

Windows are dealt in units, the batches that one process would form: process r has the units r,
r + size, ... so that each product has the same numbers, wherever it is computed.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from quip.errors import UsageError
from quip.matrix.hessian import Hessian
from quip.model.device import free_host_bytes, having

PATIENCE = timedelta(days=7)  # torchrun ends all when one dies; until then they wait for it


@dataclass(frozen=True)
class Team:
    """All processes of a job, and which of them this one is; by default it is alone."""

    rank: int = 0
    size: int = 1
    exact: bool = True  # second moments bitwise those of one process; or summed as they come

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes, prints and locks."""
        return self.rank == 0

    def check(self, count: int, batch_size: int) -> None:
        """Raise UsageError where so many windows make fewer units than there are processes."""
        units = -(-count // batch_size)
        if units < self.size:
            raise UsageError(
                f"{self.size} processes for {units} batches ({count} windows, {batch_size} at "
                f"once): one would be idle; start at most {units} (--nproc-per-node), or give "
                "more windows (--nsamples)"
            )

    def share(
        self, windows: Shaped[Tensor, "count ..."], batch_size: int
    ) -> Shaped[Tensor, "_own ..."]:
        """The windows of this process, in their order; only its last unit may be short."""
        if self.size == 1:
            return windows
        return torch.cat(windows.split(batch_size)[self.rank :: self.size])

    def agree(self, tensor: Tensor, of: int = 0) -> Tensor:
        """What process `of` has in a tensor of the same shape, type and kind of device."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        dist.broadcast(tensor, of)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest that any process has, entry by entry."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sums over all processes, entry by entry, in any order: exact for whole numbers."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, operation)
        return tensor

    def total(self, hessian: Hessian, owner: int | None = None) -> None:
        """Make the sums those of all processes at the owner, and nothing elsewhere; None: at all.

        What is complete already stays as it is.
        """
        if self.size == 1 or hessian.complete:
            return
        everywhere = partial(dist.all_reduce, op=dist.ReduceOp.SUM)
        hessian.reduce(everywhere if owner is None else partial(dist.reduce, dst=owner))
        if owner not in (None, self.rank):
            hessian.forget()

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Which process does what: the dearest first, each to whoever has least to do by then."""
        loads, found = [0.0] * self.size, {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            found[name] = owner = loads.index(min(loads))
            loads[owner] += costs[name]
        return found

    def tell(self, words: Any, of: int = 0) -> Any:
        """What process `of` says, fit for JSON; what the others would say does not matter."""
        if self.size == 1:
            return words
        text = json.dumps(words).encode() if self.rank == of else b""
        length = int(self.agree(torch.tensor([len(text)]), of))
        said = torch.frombuffer(bytearray(text) or bytearray(length), dtype=torch.uint8)
        return json.loads(bytes(self.agree(said, of).numpy()))

    def hear(self, words: Any) -> list[Any]:
        """What every process says, fit for JSON, in the order of ranks."""
        return [self.tell(words, of) for of in range(self.size)]

    def spread(
        self,
        words: Any,
        tensors: Mapping[str, Tensor],
        owner: int,
        *,
        device: torch.device | str = "cpu",
    ) -> tuple[Any, dict[str, Tensor]]:
        """The words and named tensors of process `owner`, which are on `device` there and here."""
        if self.size == 1:
            return words, dict(tensors)
        form = {k: (str(x.dtype).removeprefix("torch."), x.shape) for k, x in tensors.items()}
        words, form = self.tell((words, form), owner)
        kinds = {name: getattr(torch, kind) for name, (kind, _) in form.items()}
        sizes = [_nbytes(shape, kinds[name]) for name, (_, shape) in form.items()]
        if self.rank == owner:
            everything = torch.cat([_as_bytes(x) for x in tensors.values()] or [_nothing(device)])
            self.agree(everything, owner)
            return words, dict(tensors)
        everything = self.agree(_nothing(device).new_empty(sum(sizes)), owner)
        parts = zip(form.items(), everything.split(sizes), strict=True) if sizes else ()
        return words, {
            name: part.clone().view(kinds[name]).view(shape) for (name, (_, shape)), part in parts
        }

    def exchange(self, pieces: Float[Tensor, "size piece"]) -> Float[Tensor, "size piece"]:
        """Row r of what comes back is the row for this process that process r gave."""
        if self.size == 1:
            return pieces
        found = torch.empty_like(pieces, memory_format=torch.contiguous_format)
        dist.all_to_all_single(found, pieces.contiguous())
        return found

    def gather(
        self, own: Shaped[Tensor, "_own ..."], batch_size: int
    ) -> Shaped[Tensor, "_count ..."] | None:
        """What all processes have of something that was shared, in order, at the leader; or None.

        All are on the same kind of device.
        """
        if self.size == 1:
            return own
        counts = self.hear(len(own))
        if not self.leads:
            dist.send(own.contiguous(), 0)
            return None
        whole = own.new_empty(sum(counts), *own.shape[1:])
        for rank, count in enumerate(counts):
            if rank:
                own = own.new_empty(count, *own.shape[1:])
                dist.recv(own, rank)
            units = whole.split(batch_size)[rank :: self.size]
            for unit, part in zip(units, own.split(batch_size), strict=True):
                unit.copy_(part)
        return whole

    def scatter(
        self, whole: Shaped[Tensor, "_count ..."] | None, batch_size: int
    ) -> Shaped[Tensor, "_own ..."] | None:
        """The share of this process of what the leader has, in host memory; others give None."""
        if self.size == 1:
            return whole
        shares = [] if whole is None else [x.share(whole, batch_size) for x in self._members()]
        forms = [(str(x.dtype).removeprefix("torch."), x.shape) for x in shares]
        kind, shape = (self.tell(forms) or [(None, None)] * self.size)[self.rank]
        if kind is None:  # the leader has nothing
            return None
        for rank, share in enumerate(shares[1:], 1):
            dist.send(share, rank)
        if self.leads:
            return shares[0]
        own = torch.empty(shape, dtype=getattr(torch, kind))
        dist.recv(own, 0)
        return own

    def _members(self) -> list["Team"]:
        return [Team(rank, self.size) for rank in range(self.size)]


@contextmanager
def joined(device: str | None = "cpu", *, exact: bool = True) -> Iterator[Team]:
    """The team that torchrun started this process in, while the block runs; a process alone is one.

    Each process computes on the CUDA device of its number on this machine, unless the device asked
    for is another kind, or there is none.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(exact=exact)
        return
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(_own_device(device))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    team = Team(dist.get_rank(), size, exact)
    own = free_host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with having(-int(team.largest(torch.tensor(-own)))):
        yield team
    dist.all_reduce(torch.zeros(1))  # who is done first waits: its end would look like a failure
    dist.destroy_process_group()


def _own_device(device: str | None) -> int:
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device not in (None, "cuda"):
        raise UsageError(
            f"--device {device}: every process takes a device of its own; say cuda, cpu, or "
            "leave it out"
        )
    if local >= count:
        raise UsageError(
            f"process {local} of this machine has no CUDA device of its own, of {count}; start at "
            f"most {count} here (--nproc-per-node), or say --device cpu"
        )
    return local


ALONE = Team()


def _as_bytes(x: Tensor) -> UInt8[Tensor, " bytes"]:
    return x.detach().contiguous().flatten().view(torch.uint8)


def _nothing(device: torch.device | str) -> UInt8[Tensor, "0"]:
    return torch.empty(0, dtype=torch.uint8, device=device)


def _nbytes(shape: list[int], kind: torch.dtype) -> int:
    return torch.Size(shape).numel() * kind.itemsize
