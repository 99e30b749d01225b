"""Blocks in order, each fed by whatever the blocks before it have become."""

from collections.abc import Iterator
from contextlib import closing

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from quip.errors import UsageError
from quip.model.activations import Activations
from quip.model.block import Block
from quip.model.block_module import BlockModule
from quip.model.ferry import visits
from quip.model.matrices import coverage, find_blocks
from quip.model.states import IN_MEMORY, States
from quip.model.stream import Stream
from quip.model.team import ALONE, Team
from quip.model.twin import Twin


def walk(
    model: nn.Module,
    tokens: Int[Tensor, "count seqlen"],
    *,
    device: torch.device | str,
    batch_size: int = 1,
    start: int = 0,
    hidden: Float[Tensor, "count *streams seqlen width"] | None = None,
    stream: Stream | None = None,
    team: Team = ALONE,
    activations: Activations = IN_MEMORY,
    paired: bool = False,
) -> Iterator[Block]:
    """Each decoder block in order, on the device while the loop body runs.

        for block in walk(model, tokens, device=device):
            hessians = block.observe()
            for name, matrix in block.matrices().items():
                block.replace(name, quantized(matrix, hessians[name]))

    At the end of the body the block, as it then is, turns its inputs into those of the next
    block, and returns to where the model is (usually the host). A walk that was broken off is taken
    up at block `start` with the `hidden` states that enter it. The blocks of a model that came with
    a `stream` are in memory for their turn only, and hidden states as far as `activations` says. In
    a team, `tokens` and `hidden` are the share of this process. In a `paired` walk blocks are
    Twins, and hidden states of the model as it was are beside those of the model as it is. Raises
    UnsupportedModel before anything runs where `coverage` does, and for blocks that are no plain
    chain.
    """
    coverage(model)
    if model.training:
        raise UsageError("the model is in training mode, where dropout is random; call eval()")
    prefix, blocks = find_blocks(model)
    device, host = torch.device(device), next(model.parameters()).device
    states = States(
        model,
        tokens.to(host),
        device=device,
        batch_size=batch_size,
        stream=stream,
        team=team,
        activations=activations,
        paired=paired,
    )
    if hidden is not None:
        expected = states.streams
        if (hidden.shape, hidden.dtype) != (expected.shape, expected.dtype):
            raise UsageError(
                f"the hidden states that enter block {start} are {list(hidden.shape)} "
                f"{hidden.dtype}, and the model has {list(expected.shape)} {expected.dtype}; "
                "start over with --overwrite"
            )
        expected.copy_(hidden)
    with closing(visits(list(blocks[start:]), device, home=host, stream=stream)) as modules:
        for index, module in enumerate(modules, start):
            block = (Twin if paired else Block)(index, f"{prefix}.{index}", module, states)
            yield block
            if index + 1 < len(blocks):
                block.replay()


def blocks_at_rest(
    model: nn.Module, *, device: torch.device | str, stream: Stream | None = None
) -> Iterator[BlockModule]:
    """Each decoder block in order, on the device while the loop body runs, fed by nothing."""
    prefix, blocks = find_blocks(model)
    device, host = torch.device(device), next(model.parameters()).device
    with closing(visits(list(blocks), device, home=host, stream=stream)) as modules:
        for index, module in enumerate(modules):
            yield BlockModule(index, f"{prefix}.{index}", module, device=device)
