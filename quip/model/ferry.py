"""Blocks to the device and home again, the next one while the present one is worked on.

    a thread with a stream of its own    fetch 1       home 0, fetch 2      home 1, fetch 3
    the walk                          block 0       block 1              block 2

The thread stages weights in pinned memory, from which a device reads them beside its work; what it
allocates belongs to its stream, so the walk's own stream waits for an event before it reads it, and
is recorded as a user. A block that is done stays where it is until its copies at home are complete.
"""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quip.model.device import (
    enough_memory,
    free_bytes,
    free_host_bytes,
    release_freed,
    resident,
)
from quip.model.stream import Stream, put_state

SPARE = 8  # blocks that fit into free memory, where the next is read beforehand
log = logging.getLogger(__name__)


def visits(
    blocks: Sequence[nn.Module],
    device: torch.device,
    *,
    home: torch.device,
    stream: Stream | None = None,
) -> Generator[nn.Module, None, None]:
    """Each block in order, on the device until the next one is asked for, and then at home.

    Between the host and a CUDA device the ways overlap with the work: meanwhile the block before
    and the one after may be on the device too, and those that are to come must stay as they are.
    With a stream, home is the disk, and the next block may be read beforehand (`reads_ahead`).
    """
    if stream is not None:
        yield from _streamed(blocks, device, stream)
        return
    if (device.type, home.type) == ("cuda", "cpu"):
        yield from Ferry(device, home).visits(blocks)
        return
    for block in blocks:
        with resident(block, device, home=home):
            yield block


def reads_ahead(device: torch.device, size: int, free: int) -> bool:
    """Whether the next block, of so many bytes, is read while the present one is worked on.

    A CPU has the work and the reading to do one way or the other, and the work needs the memory.
    """
    return device.type != "cpu" and SPARE * size <= free


def _streamed(
    blocks: Sequence[nn.Module], device: torch.device, stream: Stream
) -> Iterator[nn.Module]:
    """Each block in order, read from the disk and put on the device, and then on meta again."""
    coming: Future[Mapping[str, Tensor]] | None = None
    remedy = "free the device, or say --device cpu"
    with ThreadPoolExecutor(1, "quip-stream") as crew:
        for number, block in enumerate(blocks):
            release_freed()
            try:
                put_state(block, coming.result() if coming else stream.read(stream.index(block)))
                size = sum(x.nbytes for x in block.parameters())
                ahead = reads_ahead(device, size, free_host_bytes())
                following = blocks[number + 1 : number + 2] if ahead else ()
                # The old future goes, with the tensors that it holds.
                coming = crew.submit(stream.read, stream.index(following[0])) if following else None
                with enough_memory(f"a block of the model on {device}", remedy):
                    block.to(device)
                yield block
            finally:
                stream.empty(block)


@dataclass
class Cargo:
    """Copies on the device of a block's tensors by id, with the tensors and their versions."""

    copies: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)
    complete: Any = None  # an event, for whoever reads them; None: they are

    def copy_of(self, x: Tensor) -> Tensor | None:
        """The copy of a tensor that is still what was copied."""
        original, version, copy = self.copies.get(id(x), (None, 0, x))
        return copy if original is x and x._version == version else None


class Ferry:
    """Takes blocks between two places; one that is no CUDA device has no streams to overlap."""

    def __init__(self, device: torch.device, home: torch.device) -> None:
        # With its number: another thread has another current device.
        self._device, self._home = torch.empty(0, device=device).device, home
        self._stream = torch.cuda.Stream(self._device) if device.type == "cuda" else None

    def visits(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Each block in order, on the device until the next one is asked for."""
        coming: Future[Cargo] | None = None
        leaving: Future[None] | None = None
        with ThreadPoolExecutor(1, "quip-ferry") as crew:  # at its end all have arrived
            for index, block in enumerate(blocks):
                try:
                    self._land(block, coming.result() if coming else Cargo())
                    following = blocks[index + 1 : index + 2]
                    coming = crew.submit(self._fetch, following[0]) if following else None
                    yield block
                except BaseException:  # the walk is left early
                    self._take_home(block, self._so_far())
                    raise
                if leaving:
                    leaving.result()  # raises what went wrong on the way
                leaving = crew.submit(self._take_home, block, self._so_far())
            if leaving:
                leaving.result()

    def _fetch(self, block: nn.Module) -> Cargo:
        """What the block holds, on its way to the device; nothing where that has no room for it."""
        held, cargo = (*block.parameters(), *block.buffers()), Cargo()
        # One of inference_mode tells of no change, and goes by itself.
        tensors = {id(x): x for x in held if x.device == self._home and not x.is_inference()}
        if 2 * sum(x.nbytes for x in tensors.values()) > free_bytes(self._device):
            return cargo
        with torch.no_grad(), self._aside(), suppress(torch.OutOfMemoryError):
            for key, x in tensors.items():
                version = x._version  # before x is read: it may change meanwhile
                copy = torch.empty_like(x, device=self._device)
                copy.copy_(_staged(x), non_blocking=True)
                cargo.copies[key] = x, version, copy
        cargo.complete = self._stream.record_event() if self._stream else None
        return cargo

    def _land(self, block: nn.Module, cargo: Cargo) -> None:
        """Put the block on the device, by its cargo or, where that lacks something, by itself."""
        stream = torch.cuda.current_stream(self._device) if cargo.complete else None
        if stream and cargo.complete:
            stream.wait_event(cargo.complete)

        def landed(x: Tensor) -> Tensor:
            copy = cargo.copy_of(x)
            if copy is None:
                return x.to(self._device)
            if stream:
                copy.record_stream(stream)
            return copy

        remedy = "free the device, or say --device cpu"
        with enough_memory(f"a block of the model on {self._device}", remedy):
            block._apply(landed)

    def _so_far(self) -> Any:
        """An event: when all that the walk has asked of the device will be done."""
        return torch.cuda.current_stream(self._device).record_event() if self._stream else None

    def _take_home(self, block: nn.Module, ready: Any) -> None:
        with self._aside():
            if self._stream and ready:
                self._stream.wait_event(ready)
            block.to(self._home)  # waits, so that nothing is freed that is still read

    def _aside(self) -> AbstractContextManager:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()


def _staged(x: Tensor) -> Tensor:
    """A copy in pinned memory, where the host has some to lock."""
    try:
        return x.pin_memory() if torch.cuda.is_available() else x
    except RuntimeError as error:
        log.debug("weights are copied without being pinned: %s", error)
        return x
