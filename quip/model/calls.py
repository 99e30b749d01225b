"""What a model calls each of its blocks with: masks, rotary embeddings, positions.

The model itself is run once per batch, with a stand-in for every block. It is asked block by
block, since models with sliding windows mask per block. From then on a block is a function
of its hidden states alone.

Stand-ins answer with NaN. An argument that holds NaN was computed from the output of an
earlier block, so keeping it would be wrong: such a model is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quip.errors import UnsupportedModel
from quip.model.ferry import visits
from quip.model.matrices import find_blocks
from quip.model.stream import Stream

# What can be kept and handed to a block again. Anything else may be state that blocks share.
PLAIN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """The arguments of one block on one batch, flattened, with a gap for the hidden states."""

    leaves: list[Any]
    form: pytree.TreeSpec
    gap: int

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, "Call"]:
        """The hidden states, which are the first tensor of a block's arguments; and the rest."""
        leaves, form = pytree.tree_flatten((args, kwargs))
        state = [leaf for leaf in leaves if not isinstance(leaf, PLAIN)]
        state += [v for v in kwargs.values() if isinstance(v, dict | list) and not v]
        if state:
            raise UnsupportedModel(
                f"the blocks are handed a {type(state[0]).__name__}, through which they may share "
                "state; only blocks that depend on their own arguments can be walked"
            )
        gap = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        hidden, leaves[gap] = leaves[gap], None
        return hidden, cls(leaves, form, gap)

    def sharing(self, other: "Call") -> "Call":
        """This call, holding the tensors of the other wherever the two are equal."""
        if self.form != other.form:
            return self
        pairs = zip(self.leaves, other.leaves, strict=True)
        return Call([b if _equal(a, b) else a for a, b in pairs], self.form, self.gap)

    def on(self, device: torch.device, moved: dict[int, Tensor]) -> dict[int, Tensor]:
        """id of each tensor -> its copy on the device, out of `moved` where it is there."""
        tensors = {id(leaf): leaf for leaf in self.leaves if isinstance(leaf, Tensor)}
        return {i: moved[i] if i in moved else leaf.to(device) for i, leaf in tensors.items()}

    def run(self, block: nn.Module, hidden: Tensor, moved: dict[int, Tensor]) -> Any:
        """The block's output on these hidden states, with its arguments as moved by `on`."""
        leaves = [moved.get(id(leaf), leaf) for leaf in self.leaves]
        leaves[self.gap] = hidden
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        return block(*args, **kwargs)


def _equal(a: Any, b: Any) -> bool:
    if a is b or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


class _Reached(Exception):
    """Ends a run of the model where nothing after it is needed."""


class _Recorder:
    """Stands in for every block while the model runs once."""

    def __init__(self, *, stop: int, rest: tuple[Any, ...] | None = None) -> None:
        """Ends the run at block `stop`; `rest` is what the blocks return after hidden states."""
        self.stop, self.rest = stop, rest
        self.calls: list[Call] = []
        self.entering: Tensor
        self.answer: Tensor  # what the last block called gave back

    def stand_in(self, index: int, /, *args: Any, **kwargs: Any) -> Any:
        hidden, call = Call.of(args, kwargs)
        if index != len(self.calls):
            raise UnsupportedModel(f"block {index} is called out of turn or twice")
        if index == 0:
            self.entering = hidden
        elif hidden is not self.answer:
            raise UnsupportedModel(
                f"block {index} is not called with the output of block {index - 1} itself; "
                "only plain chains of blocks can be walked"
            )
        self.calls.append(call)
        if index == self.stop:
            raise _Reached
        self.answer = torch.full_like(hidden, torch.nan)
        return self.answer if self.rest is None else (self.answer, *self.rest)

    @torch.no_grad()
    def run(self, model: nn.Module, blocks: nn.ModuleList, ids: Int[Tensor, "b seqlen"]) -> None:
        try:
            with forwards(blocks, lambda index, _: partial(self.stand_in, index)):
                model(input_ids=ids, use_cache=False)
        except _Reached:
            return
        raise UnsupportedModel(f"only {len(self.calls)} of the {len(blocks)} blocks are called")


@contextmanager
def forwards(
    blocks: nn.ModuleList, instead: Callable[[int, nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, the forward of each block is instead(index, block), and after it its own again."""
    own = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = instead(index, block)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def capture(
    model: nn.Module, batches: Sequence[Int[Tensor, "_ seqlen"]], *, device: torch.device
) -> Iterator[tuple[Float[Tensor, "b seqlen width"], list[Call]]]:
    """For each batch, the hidden states entering block 0 and the call of every block.

    What depends on the shape of a batch only, as most arguments do, is held once: each
    tensor is compared with its counterpart in the first batch of that shape.
    """
    yield from capture_by(model, batches, rest_of_output(model, batches[0][:1], device))


def capture_by(
    model: nn.Module, batches: Sequence[Int[Tensor, "_ seqlen"]], rest: tuple[Any, ...] | None
) -> Iterator[tuple[Float[Tensor, "b seqlen width"], list[Call]]]:
    """`capture`, once it is known what blocks return after hidden states: no block runs."""
    _, blocks = find_blocks(model)
    first: dict[torch.Size, list[Call]] = {}
    for ids in batches:
        recorder = _Recorder(stop=len(blocks) - 1, rest=rest)
        recorder.run(model, blocks, ids)
        if recorder.entering.shape[:-1] != ids.shape:
            raise UnsupportedModel(
                f"hidden states of shape {tuple(recorder.entering.shape)} enter block 0 for "
                f"{ids.shape[0]} x {ids.shape[1]} tokens; one vector a token is needed"
            )
        _refuse_computed(recorder.calls[1:])
        known = first.setdefault(ids.shape, recorder.calls)
        pairs = zip(recorder.calls, known, strict=True)
        yield recorder.entering, [call.sharing(other) for call, other in pairs]


@torch.no_grad()
def rest_of_output(
    model: nn.Module,
    ids: Int[Tensor, "1 seqlen"],
    device: torch.device,
    stream: Stream | None = None,
) -> tuple[Any, ...] | None:
    """What blocks return after the hidden states, with NaN for numbers; None: a bare tensor."""
    _, blocks = find_blocks(model)
    recorder = _Recorder(stop=0)
    recorder.run(model, blocks, ids)
    (call,), host = recorder.calls, recorder.entering.device
    with closing(visits([blocks[0]], device, home=host, stream=stream)) as modules:
        block = next(modules)
        output = call.run(block, recorder.entering.to(device), call.on(device, {}))
    if isinstance(output, Tensor):
        return None
    if type(output) is tuple and isinstance(output[0], Tensor):  # no named one: it is rebuilt
        return pytree.tree_map_only(Tensor, _poisoned, output[1:])
    raise UnsupportedModel(
        f"blocks return a {type(output).__name__}; a tensor or a tuple that starts with the "
        "hidden states is needed"
    )


def _poisoned(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan) if x.is_floating_point() else x


def _refuse_computed(calls: Sequence[Call]) -> None:
    tensors = {id(leaf): leaf for call in calls for leaf in call.leaves if isinstance(leaf, Tensor)}
    if any(leaf.is_floating_point() and leaf.isnan().any() for leaf in tensors.values()):
        raise UnsupportedModel(
            "an argument of the blocks is computed from the output of an earlier block; only "
            "blocks whose other arguments are known beforehand can be walked"
        )
