"""What enters and what leaves each block, kept: hidden states forward, and gradients back."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from quip.model.block import Block
from quip.model.calls import Call
from quip.model.sensitivity.measure import Pass, Passing
from quip.model.states import States


@dataclass(frozen=True)
class Crossing:
    """One unit of windows at one block of the model as it was."""

    entering: Float[Tensor, "count seqlen width"]
    gradient: Float[Tensor, "count seqlen width"]  # SCALE times d loss / d what leaves the block
    call: Call


def crossings(
    model: nn.Module, tokens: Int[Tensor, "count seqlen"], how: Passing
) -> list[list[Crossing]]:
    """The units of these windows at each block, in their order. Raises as `felt_by`.

    Hidden states and gradients of all blocks are kept, where `how` says that activations live.
    """
    found = _Kept(model, how)
    found.run(tokens, range(len(tokens)))
    return found.kept


class _Kept(Pass):
    """A pass that keeps what others let go of."""

    def __init__(self, model: nn.Module, how: Passing) -> None:
        super().__init__(model, how)
        self.kept: list[list[Crossing]] = [[] for _ in self.blocks]

    def back(
        self, block: Block, states: States, entering: Float[Tensor, "count seqlen width"]
    ) -> None:
        gradient = self.how.activations.room(entering.shape, entering.dtype)
        gradient.copy_(states.hidden)
        super().back(block, states, entering)
        units = entering.split(states.batch_size), gradient.split(states.batch_size)
        calls = states.calls(block.index)
        self.kept[block.index] += map(Crossing, *units, calls)
