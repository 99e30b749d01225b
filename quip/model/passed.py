"""A model whose blocks have done their work: called with one of the windows, it predicts.

The hidden states that leave the last block are computed first, of all windows, block by block:
only one has to be in memory. From then on the model is called as ever. Stand-ins for its blocks
let pass what they are handed, but for the last one, which answers with what leaves it of the
windows that the model was called with. So what comes after the blocks (a norm, a projection, the
head, a cap of the logits) is the model's own code, whatever its family, and so are its numbers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from quip.errors import UsageError
from quip.model.calls import Call, forwards
from quip.model.device import placed
from quip.model.finite import check_states
from quip.model.matrices import find_blocks
from quip.model.stream import Stream
from quip.model.walk import walk


@dataclass(frozen=True, kw_only=True)
class Passage:
    """How windows pass through a model."""

    device: torch.device | str
    batch_size: int = 1  # windows that pass together
    progress: bool = False  # whether a bar of blocks is drawn


@contextmanager
def ready(
    model: nn.Module,
    tokens: Int[Tensor, "count seqlen"],
    how: Passage,
    *,
    stream: Stream | None,
    what: str,
) -> Iterator[None]:
    """Inside, the model on the device can be called with these windows, in batches of that size.

    It is there as a whole or, with a stream, without its blocks, which have done their work on all
    windows before: bit for bit the same logits. Raises NonFinite, which names `what` is measured
    and the block, where hidden states are NaN or infinite.
    """
    if stream is None:
        with placed(model, how.device):
            yield
        return
    passed = pass_blocks(model, tokens, how, stream=stream, what=what)
    with passed.standing_in(model, how.device):
        yield


@dataclass(frozen=True)
class Passed:
    """The hidden states that leave the last block of a model, of all windows."""

    tokens: Int[Tensor, "count seqlen"]
    hidden: Float[Tensor, "count seqlen width"]
    rest: tuple[Any, ...] | None  # what blocks return after hidden states; None: a bare tensor

    @contextmanager
    def standing_in(self, model: nn.Module, device: torch.device | str) -> Iterator[None]:
        """Inside, the model on the device, but for its blocks, which need not be anywhere.

        It answers the windows with their logits, and raises UsageError for any others.
        """
        _, blocks = find_blocks(model)
        rows = {_key(window): row for row, window in enumerate(self.tokens.cpu())}
        asked: list[int] = []  # the rows of the windows that the model is called with

        def see(_: nn.Module, __: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            keys = [_key(window) for window in kwargs["input_ids"].cpu()]
            if not rows.keys() >= {*keys}:
                raise UsageError("the blocks of this model have seen other windows than these")
            asked[:] = [rows[key] for key in keys]

        def stand_in(index: int, /, *args: Any, **kwargs: Any) -> Any:
            hidden, _ = Call.of(args, kwargs)
            if index + 1 == len(blocks):
                hidden = self.hidden[asked].to(hidden.device)
            return hidden if self.rest is None else (hidden, *self.rest)

        hook = model.register_forward_pre_hook(see, with_kwargs=True)
        try:
            with (
                placed_but_for(blocks, model, device),
                forwards(blocks, lambda index, _: partial(stand_in, index)),
            ):
                yield
        finally:
            hook.remove()


@torch.no_grad()
def pass_blocks(
    model: nn.Module,
    tokens: Int[Tensor, "count seqlen"],
    how: Passage,
    *,
    stream: Stream | None,
    what: str,
) -> Passed:
    """What leaves the last block, of all windows. Raises NonFinite as `ready` does."""
    prefix, blocks = find_blocks(model)
    dtype = next(model.parameters()).dtype
    bar = tqdm(total=len(blocks), desc="blocks", unit="block", disable=not how.progress)
    where = f"before {prefix}.0"
    with bar, placed_but_for(blocks, model, how.device):
        for block in walk(
            model, tokens, device=how.device, batch_size=how.batch_size, stream=stream
        ):
            check_states(block.hidden, what, where, dtype)
            where = f"in {block.name}"
            if block.index + 1 == len(blocks):
                block.replay()  # which the walk leaves out: it leads to no other block
                check_states(block.hidden, what, where, dtype)
                found = Passed(tokens, block.hidden, block.rest)
            bar.update()
    return found


@contextmanager
def placed_but_for(
    blocks: nn.ModuleList, model: nn.Module, device: torch.device | str
) -> Iterator[None]:
    """Inside, all of the model that is not in its blocks is on the device, then back."""
    inside = {id(module) for module in blocks.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    homes = [
        (tensor, tensor.data)
        for module in outside
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    moved: dict[int, Tensor] = {}  # tied tensors stay one
    try:
        for tensor, home in homes:
            tensor.data = moved.setdefault(id(tensor), home.to(device))
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


def _key(window: Int[Tensor, " seqlen"]) -> bytes:
    return window.contiguous().numpy().tobytes()
