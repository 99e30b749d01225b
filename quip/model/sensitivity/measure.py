"""The pass: windows go forward through all blocks, and gradients back, one block at a time.

What enters each block is kept, for as many windows as there is room for; on the way back a block
runs again. Nothing else of a forward pass is held but that of one block and unit, and the blocks
of a model that is streamed are read twice for each such chunk of windows.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from quip.errors import UsageError, shown
from quip.model.activations import Activations
from quip.model.block import Block
from quip.model.calls import Call, forwards
from quip.model.device import enough_memory
from quip.model.ferry import visits
from quip.model.matrices import coverage, find_blocks
from quip.model.passed import placed_but_for
from quip.model.sensitivity.felt import Felt
from quip.model.sensitivity.labels import KINDS, gradient_at_logits, rng_of_window
from quip.model.states import IN_MEMORY, REMEDY, States
from quip.model.stream import Stream
from quip.model.team import ALONE, Team


@dataclass(frozen=True, kw_only=True)
class Passing:
    """How windows pass through a model, and gradients back."""

    kind: str  # of labels, one of quip.model.sensitivity.labels.KINDS
    seed: int  # of labels that are drawn
    device: torch.device
    batch_size: int = 1  # windows that pass together
    team: Team = ALONE
    stream: Stream | None = None
    activations: Activations = IN_MEMORY

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(
                f"--token_weights {shown(self.kind)}: say {' or '.join(KINDS)}, or leave it out"
            )


@torch.no_grad()
def felt_by(model: nn.Module, tokens: Int[Tensor, "count seqlen"], how: Passing) -> list[Felt]:
    """What is felt in each block on the windows of this process.

    The model stays as it is. Raises UsageError where memory is short or the model is in training
    mode, and UnsupportedModel as `walk` does.
    """
    found = _Feeling(model, how)
    own = how.team.share(tokens, how.batch_size)
    found.run(own, how.team.share(torch.arange(len(tokens)), how.batch_size).tolist())
    return [found.felt[index] for index in range(len(found.blocks))]


class Pass:
    """Chunks of windows, one after the other, forward through all blocks and back."""

    def __init__(self, model: nn.Module, how: Passing) -> None:
        coverage(model)
        if model.training:
            raise UsageError("the model is in training mode, where dropout is random; call eval()")
        self._model, self.how = model, how
        self._prefix, blocks = find_blocks(model)
        self._home = next(model.parameters()).device
        self.blocks = blocks

    def run(self, tokens: Int[Tensor, "count seqlen"], numbers: Sequence[int]) -> None:
        """Let these windows, of these numbers in all of them, pass forward and back."""
        size = _windows_at_once(self._model, tokens.shape[1], self.how)
        total = 2 * len(self.blocks) * -(-len(tokens) // size)
        # disable=None: a bar on a terminal only.
        bar = tqdm(total=total, desc="sensitivity", unit="block", dynamic_ncols=True, disable=None)
        with bar, enough_memory(f"a backward pass on {self.how.device}", REMEDY):
            for lo in range(0, len(tokens), size):
                self._add(tokens[lo : lo + size], numbers[lo : lo + size], bar)

    def _add(self, tokens: Int[Tensor, "count seqlen"], numbers: Sequence[int], bar: tqdm) -> None:
        how = self.how
        states = States(
            *(self._model, tokens.to(self._home)),
            device=how.device,
            batch_size=how.batch_size,
            stream=how.stream,
            team=how.team,
            activations=how.activations,
        )
        hidden, order = states.hidden, range(len(self.blocks))
        entering = how.activations.room((len(order), *hidden.shape), hidden.dtype)
        for block in self._visit(states, order):
            entering[block.index] = hidden
            block.replay()
            bar.update()
        self._predict(states, tokens, numbers)
        for block in self._visit(states, order[::-1]):
            self.back(block, states, entering[block.index])
            bar.update()

    def _visit(self, states: States, order: Sequence[int]) -> Iterator[Block]:
        """The blocks of these numbers, each on the device while it is worked on."""
        how, modules = self.how, [self.blocks[index] for index in order]
        with closing(visits(modules, how.device, home=self._home, stream=how.stream)) as there:
            for index, module in zip(order, there, strict=True):
                yield Block(index, f"{self._prefix}.{index}", module, states)

    def _predict(
        self, states: States, tokens: Int[Tensor, "count seqlen"], numbers: Sequence[int]
    ) -> None:
        """Put the gradient where the hidden states are that leave the last block."""
        how, last, leaving = self.how, len(self.blocks) - 1, list[Tensor]()

        def stand_in(index: int, /, *args: Any, **kwargs: Any) -> Any:
            hidden = leaving[0] if index == last else Call.of(args, kwargs)[0]
            return hidden if states.rest is None else (hidden, *states.rest)

        with (
            placed_but_for(self.blocks, self._model, how.device),
            forwards(self.blocks, lambda index, _: partial(stand_in, index)),
        ):
            for row, number in enumerate(numbers):
                ids, hidden = tokens[row : row + 1].to(how.device), states.hidden[row : row + 1]
                leaving[:] = [leaf := _leaf(hidden, how.device)]
                with torch.enable_grad():
                    logits = self._model(input_ids=ids, use_cache=False).logits
                rng = rng_of_window(how.seed, number)
                g = gradient_at_logits(logits.detach()[0], ids[0], kind=how.kind, rng=rng)
                hidden.copy_(torch.autograd.grad(logits, leaf, g[None])[0])

    def back(
        self, block: Block, states: States, entering: Float[Tensor, "count seqlen width"]
    ) -> None:
        """Put the gradient where what enters the block is in place of that where it leaves."""
        for _ in self._units_back(block, states, entering):
            pass

    def _units_back(
        self, block: Block, states: States, entering: Float[Tensor, "count seqlen width"]
    ) -> Iterator[Float[Tensor, "windows seqlen width"]]:
        """What entered, of each unit whose gradient has just passed back through the block."""
        device, moved = self.how.device, dict[int, Tensor]()
        units = entering.split(states.batch_size), states.batches(), states.calls(block.index)
        for x, gradient, call in zip(*units, strict=True):
            moved, leaf = call.on(device, moved), _leaf(x, device)
            with torch.enable_grad():
                output = call.run(block.module, leaf.clone(), moved)  # may add in place
            y = output[0] if isinstance(output, tuple) else output
            gradient.copy_(torch.autograd.grad(y, leaf, gradient.to(device))[0])
            yield x


class _Feeling(Pass):
    """A pass that notes on the way back what is felt in each block."""

    def __init__(self, model: nn.Module, how: Passing) -> None:
        super().__init__(model, how)
        self.felt: dict[int, Felt] = {}

    def back(
        self, block: Block, states: States, entering: Float[Tensor, "count seqlen width"]
    ) -> None:
        if block.index not in self.felt:
            self.felt[block.index] = Felt(block, apart=self.how.team.size > 1)
        felt = self.felt[block.index]
        with felt.watching(block):
            for x in self._units_back(block, states, entering):
                felt.end_unit((len(x), x.shape[1]))


def _leaf(x: Tensor, device: torch.device) -> Tensor:
    return x.detach().to(device, copy=True).requires_grad_()


def _windows_at_once(model: nn.Module, seqlen: int, how: Passing) -> int:
    """The windows of a chunk: where blocks come from elsewhere, as many as there is room for."""
    if how.stream is None and next(model.parameters()).device.type == how.device.type:
        return how.batch_size
    config: Any = model.config
    width = config.get_text_config().hidden_size
    each = len(find_blocks(model)[1]) * seqlen * width * next(model.parameters()).dtype.itemsize
    return max(1, how.activations.limit // (each * how.batch_size)) * how.batch_size
