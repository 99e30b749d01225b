"""The walk itself: blocks in order, each fed by whatever the blocks before it have become."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from quip.errors import NonFinite, UnsupportedModel, UsageError
from quip.matrix.hessian import Hessian
from quip.model.calls import Call, capture
from quip.model.matrices import coverage, find_blocks
from quip.model.module import BlockModule

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
            for name, linear in block.linears().items():
                block.replace(name, quantized(linear, hessians[name]))

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
        entering.copy_(hidden)
    for index, module in enumerate(blocks[start:], start):
        try:
            block = Block(
                index,
                f"{prefix}.{index}",
                module.to(device),
                entering,
                [batch_calls[index] for batch_calls in calls],
                device=device,
                batch_size=batch_size,
            )
            yield block
            if index + 1 < len(blocks):
                block.replay()
        finally:
            module.to(host)


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


class Block(BlockModule):
    """One decoder block and the hidden states that enter it.

    `hidden` is overwritten in place when the walk moves on: it then enters the next block.
    """

    def __init__(
        self,
        index: int,
        name: str,
        module: nn.Module,
        hidden: Float[Tensor, "count seqlen width"],
        calls: list[Call],
        *,
        device: torch.device,
        batch_size: int,
    ) -> None:
        super().__init__(index, name, module, device=device)
        self.hidden, self.batch_size, self._calls = hidden, batch_size, calls

    @torch.no_grad()
    def observe(self) -> dict[str, Hessian]:
        """The Hessian of every matrix's inputs, from one forward pass of the block as it is.

        Matrices that are fed by the same tensor (q, k and v; gate and up) map to the same
        object. Raises NonFinite or UnsupportedModel, naming the matrix, where inputs are NaN
        or infinite, and where a matrix never ran.
        """
        observer, linears = _Observer(), self.linears()
        hooks = [
            linear.register_forward_pre_hook(partial(observer.see, name), with_kwargs=True)
            for name, linear in linears.items()
        ]
        try:
            for _ in self.run():
                observer.forget_inputs()
        finally:
            for hook in hooks:
                hook.remove()
        return observer.hessians(linears)

    @torch.no_grad()
    def replay(self) -> None:
        """hidden = block(hidden). The walk does this between two blocks."""
        for entering, leaving in self.run():
            self._check(entering, leaving)
            entering.copy_(leaving)

    @torch.no_grad()
    def outputs(self) -> Float[Tensor, "count seqlen width"]:
        """block(hidden), where the hidden states live."""
        found = torch.empty_like(self.hidden)
        for kept, (entering, leaving) in zip(found.split(self.batch_size), self.run(), strict=True):
            self._check(entering, leaving)
            kept.copy_(leaving)
        return found

    def run(
        self, batches: Sequence[int] | None = None, *, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The hidden states of each of these batches (None: all), and what the block makes of them.

        With a dtype, whatever the block is handed is cast to it; the block itself is not.
        """
        entering = self.hidden.split(self.batch_size)
        moved: dict[int, Tensor] = {}  # what one batch shares with the next is moved once
        for i in range(len(entering)) if batches is None else batches:
            call = self._calls[i]
            moved = {k: _cast(x, dtype) for k, x in call.on(self._device, moved).items()}
            # A copy: some blocks add to their inputs in place.
            hidden = entering[i].to(self._device, dtype or entering[i].dtype, copy=True)
            output = call.run(self.module, hidden, moved)
            yield entering[i], output[0] if isinstance(output, tuple) else output

    def _check(self, entering: Tensor, leaving: Tensor) -> None:
        if leaving.shape != entering.shape or leaving.dtype != entering.dtype:
            raise UnsupportedModel(
                f"{self.name} turns hidden states of {tuple(entering.shape)} {entering.dtype} "
                f"into {tuple(leaving.shape)} {leaving.dtype}; they must stay alike"
            )


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.to(dtype) if dtype is not None and x.is_floating_point() else x


class _Observer:
    """One Hessian per distinct input tensor, whichever matrices it feeds.

    Matrices share when their first inputs are the same memory, unmodified. The inputs of the
    running batch are held, so that no address is used twice.
    """

    def __init__(self) -> None:
        self._leader: dict[str, str] = {}
        self._sums: dict[str, Hessian] = {}
        self._tokens: Counter[str] = Counter()
        self._inputs: dict[tuple, tuple[str, Tensor]] = {}

    def see(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        """A forward pre-hook, once `name` is bound."""
        x = args[0] if args else kwargs["input"]
        if x.numel() == 0:  # an expert that no token of this batch chose
            return
        if name not in self._leader:
            # A flattened view of x is x.
            shape = x.shape[-1:] if x.is_contiguous() else (*x.shape, *x.stride())
            key = (x.data_ptr(), x.numel(), *shape, x._version)
            leader, _ = self._inputs.setdefault(key, (name, x))
            self._leader[name] = leader
            if leader == name:
                self._sums[name] = Hessian(x.shape[-1], device=x.device)
        self._tokens[name] += x.numel() // x.shape[-1]
        if self._leader[name] == name:
            self._sums[name].update(x)

    def forget_inputs(self) -> None:
        self._inputs.clear()

    def hessians(self, names: Iterable[str]) -> dict[str, Hessian]:
        for name in names:
            if not self._tokens[name]:
                raise UnsupportedModel(
                    f"{name} never ran: an expert that no calibration token chose (add samples), "
                    "or a matrix that is used without calling its module"
                )
            if self._tokens[name] != self._tokens[self._leader[name]]:
                raise UnsupportedModel(
                    f"{name} shares its first input with {self._leader[name]} but not the later "
                    "ones; only matrices that run once per pass can be walked"
                )
        for name, hessian in self._sums.items():
            if not hessian.value().diagonal().isfinite().all():
                raise NonFinite(
                    f"{name}: NaN or infinity among its inputs on the calibration tokens; "
                    "load the model as float32, or check its weights"
                )
        return {name: self._sums[self._leader[name]] for name in names}
