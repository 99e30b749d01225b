"""The hidden states between two blocks, and what every block is called with beside them."""

import logging
from contextlib import suppress

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from quip.errors import UsageError
from quip.model.activations import Activations
from quip.model.calls import Call, capture_by, rest_of_output
from quip.model.device import enough_memory, free_bytes
from quip.model.matrices import find_blocks
from quip.model.stream import Stream
from quip.model.team import ALONE, Team

TOKENS_PER_BATCH = 4096  # enough for full matrix products, little enough for any memory
MOST_TOKENS = 2**16  # of a batch on a CUDA device, beyond which nothing is gained
SHARE = 4  # of the card's memory, for what a batch holds inside a block: one part of so many
REMEDY = "give a smaller --seqlen, free the device, or say --device cpu"
IN_MEMORY = Activations()
log = logging.getLogger(__name__)


class States:
    """The hidden states of all windows, and the calls of every block on each batch of them.

    They live on the device where it has four times the room for them, otherwise in the host's
    memory, pinned where that can be, or in a file where they exceed what `activations` allow.
    `hidden` is overwritten in place from block to block. In a `paired` walk so are, beside it, the
    hidden states of the model as it was (`original`); `streams` has both.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "count seqlen"],
        *,
        device: torch.device,
        batch_size: int,
        stream: Stream | None = None,
        team: Team = ALONE,
        activations: Activations = IN_MEMORY,
        paired: bool = False,
    ) -> None:
        self.paired = paired
        self.team = team  # of which this process has these windows
        self._activations = activations
        self._model, self._tokens = model, tokens
        self.device, self.batch_size = device, batch_size
        with enough_memory(f"a window of {tokens.shape[1]} tokens on {device}", REMEDY):
            self.rest = rest_of_output(model, tokens[:1], device, stream)
        self.streams, self._calls = self._enter()
        self.pinned = device.type == "cuda" and self.streams.is_pinned()

    @property
    def hidden(self) -> Float[Tensor, "count seqlen width"]:
        """The hidden states of the model as it is."""
        return self.streams[:, 0] if self.paired else self.streams

    @property
    def original(self) -> Float[Tensor, "count seqlen width"]:
        """The hidden states of the model as it was, in a paired walk."""
        return self.streams[:, 1]

    def calls(self, block: int) -> list[Call]:
        """What the block is called with on each batch."""
        return [calls[block] for calls in self._calls]

    def batches(self) -> tuple[Float[Tensor, "_b seqlen width"], ...]:
        """The hidden states of each batch, which share the memory of `hidden`."""
        return self.hidden.split(self.batch_size)

    def halve(self, name: str) -> None:
        """From now on half as many windows or fewer pass together, as there was no memory for more.

        Batches that end where one of those before did still do. Raises UsageError, with the name of
        the block, where a single window was too many.
        """
        if self.batch_size == 1:
            raise UsageError(
                f"{name}: {self.device} has no memory for a window of {self._tokens.shape[1]} "
                f"tokens; {REMEDY}"
            )
        parts = (size for size in range(self.batch_size // 2, 0, -1) if not self.batch_size % size)
        self.batch_size = next(parts)
        log.warning(
            "%s: out of memory on %s; from here on %d windows pass together, which may change "
            "numbers in their last digits",
            *(name, self.device, self.batch_size),
        )
        batches = self._tokens.split(self.batch_size)
        self._calls = [calls for _, calls in capture_by(self._model, batches, self.rest)]

    def settle(self) -> None:
        """Wait until what was copied into `hidden` is there for the host to read."""
        if self.pinned:
            torch.cuda.current_stream(self.device).synchronize()

    def room_beside(self) -> Tensor:
        """Memory for as many hidden states again, without content, where there is some."""
        hidden = self.hidden
        if hidden.device.type == "cpu":
            return self._activations.room(hidden.shape, hidden.dtype)
        return torch.empty_like(hidden)

    def _room(self, entering: Tensor) -> Tensor:
        """Memory for the hidden states of all windows, of which these are some."""
        both = (2,) if self.paired else ()
        shape, device = (len(self._tokens), *both, *entering.shape[1:]), self.device
        nbytes = torch.Size(shape).numel() * entering.itemsize
        if device.type == "cuda":
            if 4 * nbytes <= free_bytes(device):
                return entering.new_empty(shape, device=device)
            with suppress(RuntimeError):  # more than the host lets us lock
                if not self._activations.exceed(nbytes):
                    return entering.new_empty(shape, device="cpu", pin_memory=True)
        return self._activations.room(shape, entering.dtype)

    def _enter(self) -> tuple[Float[Tensor, "count ..."], list[list[Call]]]:
        """The hidden states that enter block 0, paired or not, and calls[batch][block]."""
        streams: Tensor | None = None
        calls: list[list[Call]] = []
        batches = self._tokens.split(self.batch_size)
        for entering, batch_calls in capture_by(self._model, batches, self.rest):
            if streams is None:
                streams = self._room(entering)
            start = len(calls) * self.batch_size
            rows = streams[start : start + len(entering)]
            rows.copy_(entering[:, None] if self.paired else entering)
            calls.append(batch_calls)
        assert streams is not None
        return streams, calls


def batch_size_for(seqlen: int, model: nn.Module, device: torch.device | str) -> int:
    """Windows of so many tokens that pass through a block of the model together.

    On a CUDA device as many as a quarter of its memory holds the inputs and outputs of a block's
    matrices of, in float32; a power of two. All of its memory counts, not what is free of it: a
    run that is taken up on such a card goes on in the same batches, to the same numbers.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return max(1, TOKENS_PER_BATCH // seqlen)
    total = torch.cuda.get_device_properties(device).total_memory
    return _windows(seqlen, find_blocks(model)[1][0], total)


def _windows(seqlen: int, block: nn.Module, total: int) -> int:
    """The windows of a batch on a card with so many bytes."""
    matrices = [module for module in block.modules() if isinstance(module, nn.Linear)]
    token = 4 * sum(matrix.in_features + matrix.out_features for matrix in matrices)
    tokens = max(TOKENS_PER_BATCH, min(MOST_TOKENS, total // (SHARE * max(1, token))))
    return 1 << (max(1, tokens // seqlen).bit_length() - 1)
