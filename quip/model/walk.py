"""Blocks in order, each fed by whatever the blocks before it have become."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from quip.errors import UsageError
from quip.model.block import Block, BlockModule
from quip.model.calls import Call, capture
from quip.model.device import resident
from quip.model.matrices import coverage, find_blocks

TOKENS_PER_BATCH = 4096  # enough for full matrix products, little enough for any memory


def batch_size_for(seqlen: int) -> int:
    """Windows of so many tokens that pass through a block together."""
    return max(1, TOKENS_PER_BATCH // seqlen)


def walk(
    model: nn.Module,
    tokens: Int[Tensor, "count seqlen"],
    *,
    device: torch.device | str,
    batch_size: int = 1,
    start: int = 0,
    hidden: Float[Tensor, "count seqlen width"] | None = None,
) -> Iterator["Block"]:
    """Each decoder block in order, on the device while the loop body runs.

        for block in walk(model, tokens, device=device):
            hessians = block.observe()
            for name, matrix in block.matrices().items():
                block.replace(name, quantized(matrix, hessians[name]))

    At the end of the body the block, as it then is, turns its inputs into those of the next
    block, and returns to where the model is (usually the host). A walk that was broken off is taken
    up at block `start` with the `hidden` states that enter it. Raises UnsupportedModel before
    anything runs where `coverage` does, and for blocks that are no plain chain.
    """
    coverage(model)
    if model.training:
        raise UsageError("the model is in training mode, where dropout is random; call eval()")
    prefix, blocks = find_blocks(model)
    device, host = torch.device(device), next(model.parameters()).device
    entering, calls = _enter(model, tokens.to(host), device=device, batch_size=batch_size)
    if hidden is not None:
        if (hidden.shape, hidden.dtype) != (entering.shape, entering.dtype):
            raise UsageError(
                f"the hidden states that enter block {start} are {list(hidden.shape)} "
                f"{hidden.dtype}, and the model has {list(entering.shape)} {entering.dtype}; "
                "start over with --overwrite"
            )
        entering.copy_(hidden)
    for index, module in enumerate(blocks[start:], start):
        with resident(module, device, home=host):
            block = Block(
                index,
                f"{prefix}.{index}",
                module,
                entering,
                [batch_calls[index] for batch_calls in calls],
                device=device,
                batch_size=batch_size,
            )
            yield block
            if index + 1 < len(blocks):
                block.replay()


def _enter(
    model: nn.Module, tokens: Int[Tensor, "count seqlen"], *, device: torch.device, batch_size: int
) -> tuple[Float[Tensor, "count seqlen width"], list[list[Call]]]:
    """The hidden states that enter block 0, and calls[batch][block]."""
    hidden: Tensor | None = None
    calls: list[list[Call]] = []
    for entering, batch_calls in capture(model, tokens.split(batch_size), device=device):
        if hidden is None:
            shape, nbytes = (len(tokens), *entering.shape[1:]), len(tokens) * entering[0].nbytes
            hidden = entering.new_empty(shape, device=_home(device, nbytes))
        start = len(calls) * batch_size
        hidden[start : start + len(entering)] = entering
        calls.append(batch_calls)
    assert hidden is not None
    return hidden, calls


def _home(device: torch.device, nbytes: int) -> torch.device:
    """Where activations live: on a GPU with four times the room, otherwise in host memory."""
    if device.type == "cuda" and 4 * nbytes <= torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


def blocks_at_rest(model: nn.Module, *, device: torch.device | str) -> Iterator[BlockModule]:
    """Each decoder block in order, on the device while the loop body runs, fed by nothing."""
    prefix, blocks = find_blocks(model)
    device, host = torch.device(device), next(model.parameters()).device
    for index, module in enumerate(blocks):
        with resident(module, device, home=host):
            yield BlockModule(index, f"{prefix}.{index}", module, device=device)
