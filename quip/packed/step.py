"""One decoding step of a model with everything in its place, as a CUDA graph can hold it.

The token, its position, keys and values lie in tensors that stay where they are and as large as
they are. A device is then handed all kernels of a step at once; to launch them one after the other
takes Python longer than it takes the device to run them.
"""

import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from quip.errors import one_line
from quip.packed.experts import Experts

ROOM = (
    512  # tokens that a cache has room for beyond those it holds; then it grows to twice its size
)
ALIGNED = 64  # lengths of caches are multiples of it: kernels of attention read masks in words
FEWEST = 8  # tokens to come for which a graph is worth the time that it takes to make one
MASKED = ("eager", "sdpa")  # kinds of attention that leave out what a cache has room for
log = logging.getLogger(__name__)

Compute = Callable[[], Tensor]
Capture = Callable[[Compute, torch.device], Compute]


def capture_on_cuda(compute: Compute, device: torch.device) -> Compute:
    """What calls the kernels of `compute` as one graph; the result is in the same tensor each time.

    Raises RuntimeError where something waits for the device, or the device has no memory left.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        torch.cuda.graph(
            graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"
        ),
    ):
        result = compute()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


# By type of device. Elsewhere calls cost little beside what they compute, and a cache that grows
# with the text is as fast as one that need not: it stays with the model's own.
CAPTURES: dict[str, Capture] = {"cuda": capture_on_cuda}


class Step:
    """step(tokens) is what the model predicts after these tokens, one for each text of a batch.

    The first step is run as it is, which loads what kernels need; the second one is captured. Where
    that fails, steps go on without a graph, and one line in the log says why.
    """

    def __init__(
        self, model: PreTrainedModel, cache: DynamicCache, left: int, capture: Capture
    ) -> None:
        self._model: Any = model
        first: Any = cache.layers[0]
        keys = first.keys  # [batch, heads, tokens, size]
        self._capture = capture
        self._length = keys.shape[2]  # tokens in the cache
        self._most = self._length + left
        self._tokens = torch.zeros(len(keys), 1, dtype=torch.long, device=keys.device)
        self._positions = torch.full_like(self._tokens, self._length)
        self.captured = False
        self._next: Callable[[Step], Tensor]
        self._move(cache)

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, "batch 1"]) -> Float[Tensor, "batch vocab"]:
        """Logits in float32, where the next call may overwrite them."""
        if self._length == self._room:
            self._move(self._cache)
        self._length += 1
        self._tokens.copy_(tokens)
        return self._next(self)

    def _move(self, cache: Any) -> None:
        """Copy keys and values to where there is room for more tokens."""
        room = min(self._most, self._length + max(self._length, ROOM))
        self._room = -(-room // ALIGNED) * ALIGNED
        self._cache = StaticCache(config=self._model.config, max_cache_len=self._room)
        for index, layer in enumerate(cache.layers):
            self._cache.update(layer.keys, layer.values, index)
        self._next = Step._begin  # not bound: memory of a device is not left to the collector

    def _begin(self) -> Tensor:
        self._next = Step._begin_graph
        return self._compute()

    def _begin_graph(self) -> Tensor:
        try:
            replay = self._capture(self._compute, self._tokens.device)
        except RuntimeError as error:  # nothing was computed
            _say_without(one_line(error))
            self._next = Step._compute
        else:
            self._next, self.captured = lambda _: replay(), True
        return self._next(self)

    def _compute(self) -> Tensor:
        inputs = self._model.prepare_inputs_for_generation(
            self._tokens,
            past_key_values=self._cache,
            position_ids=self._positions,
            use_cache=True,
        )
        logits = self._model(**inputs, return_dict=True).logits[:, -1].float()
        self._positions.add_(1)
        return logits


def fixed_step(model: PreTrainedModel, cache: object, left: int) -> Step | None:
    """The step for at most `left` tokens after those in the cache, which is left as it is.

    None where there is no graph to gain, as on a CPU or for a few tokens; and for models and caches
    of which more changes from step to step, such as windows that slide.
    """
    capture = CAPTURES.get(model.device.type)
    if capture is None or left < FEWEST or not _is_fixed(model, cache):
        return None
    assert isinstance(cache, DynamicCache)
    try:
        return Step(model, cache, left, capture)
    except torch.OutOfMemoryError as error:
        _say_without(one_line(error))
        return None


def _is_fixed(model: Any, cache: object) -> bool:
    """Whether each step of the model is the same computation with a cache of fixed size."""
    if type(cache) is not DynamicCache or model.training:
        return False
    return (
        model._can_compile_fullgraph
        and not any(isinstance(module, Experts) for module in model.modules())  # as tokens choose
        and model.config._attn_implementation in MASKED
        and "position_ids" in inspect.signature(model.forward).parameters
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and [type(x) for x in StaticCache(config=model.config, max_cache_len=1).layers]
        == [StaticLayer] * len(cache.layers)
        and _devices(model) == {model.device}
    )


def _devices(model: nn.Module) -> set[torch.device]:
    return {x.device for x in (*model.parameters(), *model.buffers())}


@cache  # one line a process
def _say_without(reason: str) -> None:
    log.warning("tokens are computed without a CUDA graph, more slowly: %s", reason)
