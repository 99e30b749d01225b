"""A decoder block while it is walked over, and the hidden states that enter it."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quip.errors import UnsupportedModel
from quip.matrix.hessian import Observed
from quip.model.block_module import BlockModule
from quip.model.experts import Routed
from quip.model.matrices import Matrix
from quip.model.observe import Observer, Outgrown
from quip.model.sensitivity.found import Sensitivity
from quip.model.states import States
from quip.packed.experts import Experts
from quip.packed.linear import QuantizedLinear
from quip.packed.stack import StackedLinear

Found = TypeVar("Found")
# What entered and what leaves, of batches of these numbers.
Runner: TypeAlias = Callable[[Sequence[int]], Iterator[tuple[Tensor, Tensor]]]


class Block(BlockModule):
    """One decoder block and the hidden states that enter it.

    `hidden` is overwritten in place when the walk moves on: it then enters the next block.
    """

    def __init__(
        self,
        index: int,
        name: str,
        module: nn.Module,
        states: States,
    ) -> None:
        super().__init__(index, name, module, device=states.device)
        self._states = states

    @property
    def hidden(self) -> Float[Tensor, "count seqlen width"]:
        """The hidden states of all windows, which enter the block."""
        return self._states.hidden

    @property
    def streams(self) -> Float[Tensor, "count *streams seqlen width"]:
        """What of them a walk is taken up with: in a paired one, those of the original beside."""
        return self._states.streams

    @property
    def rest(self) -> tuple[Any, ...] | None:
        """What blocks return after the hidden states, NaN for numbers; None: a bare tensor."""
        return self._states.rest

    @property
    def batch_size(self) -> int:
        """Windows that pass through the block together."""
        return self._states.batch_size

    def observe(
        self, names: Collection[str] | None = None, *, all_experts: bool = False
    ) -> dict[str, Observed]:
        """The Hessian of every matrix's inputs, from one forward pass of the block as it is.

        With `names`, of these matrices alone. Matrices that are fed by the same tensor (q, k and v;
        gate and up) map to the same object. Those of experts are summed up when they are asked for
        (quip.model.experts), over the tokens that the router sent or, with `all_experts`, over all.
        Raises NonFinite or UnsupportedModel, naming the matrix, where inputs are NaN or infinite,
        and where a matrix never ran.
        """
        (found,) = self.observe_each([None], names, all_experts=all_experts)
        return found

    @torch.no_grad()
    def observe_each(
        self,
        weights: Sequence[Sensitivity | None],
        names: Collection[str] | None = None,
        *,
        all_experts: bool = False,
    ) -> list[dict[str, Observed]]:
        """What `observe` finds for each of these weights of tokens, from the same pass."""
        matrices, anchors = self.matrices(), [dict[str, Tensor]() for _ in weights]
        if names is not None:
            matrices = {name: matrices[name] for name in names}

        def observe() -> list[dict[str, Observed]]:
            observers = [
                Observer(self._states.team, own, weights=each, device=self._device)
                for own, each in zip(anchors, weights, strict=True)
            ]
            return self._observe(matrices, observers, all_experts)

        return self._persist(observe)

    def _persist(self, observe: Callable[[], Found]) -> Found:
        """What a pass over all batches finds, once its sums are exact and its batches fit."""
        while True:
            try:
                return observe()
            except Outgrown:
                continue
            except torch.OutOfMemoryError:
                pass  # what its frames hold is free only after this clause
            self._states.halve(self.name)

    def _observe(
        self, matrices: Mapping[str, Matrix], observers: Sequence[Observer], all_experts: bool
    ) -> list[dict[str, Observed]]:
        routed = [(module, one) for module, one in self._routed() if one.has_any(matrices)]
        alone = {
            name: matrix
            for name, matrix in matrices.items()
            if not any(name.startswith(f"{one.name}.") for _, one in routed)
        }
        hooks = [
            module.register_forward_pre_hook(one.see, with_kwargs=True) for module, one in routed
        ]
        hooks += [
            matrix.module.register_forward_pre_hook(partial(observer.see, name), with_kwargs=True)
            for name, matrix in alone.items()
            for observer in observers
        ]
        try:
            for _ in self.run():
                for observer in observers:
                    observer.end_batch()
        finally:
            for hook in hooks:
                hook.remove()
        return [
            self._found(matrices, alone, observer, [one for _, one in routed], all_experts)
            for observer in observers
        ]

    def _found(
        self,
        matrices: Mapping[str, Matrix],
        alone: Mapping[str, Matrix],
        observer: Observer,
        routed: Sequence[Routed],
        all_experts: bool,
    ) -> dict[str, Observed]:
        observer.join()
        found: dict[str, Observed] = {**observer.hessians(alone)}
        for one in routed:
            own = one.weighing(observer.weights.sent(one.name)) if observer.weights else one
            found |= own.hessians(all_experts=all_experts)
        return {name: found[name] for name in matrices}

    def _routed(self) -> list[tuple[nn.Module, Routed]]:
        """Each module of experts, and a place for what its router sends."""
        home, team = self.hidden.device, self._states.team
        return [
            (module, Routed(f"{self.name}.{name}", module, home=home, team=team))
            for name, module in self.module.named_modules()
            if isinstance(module, Experts)
        ]

    @torch.no_grad()
    def replay(self) -> None:
        """hidden = block(hidden). The walk does this between two blocks."""
        self._replay(self.run)

    def _replay(self, run: Runner) -> None:
        for entering, leaving in self._run_all(run):
            entering.copy_(leaving, non_blocking=self._states.pinned)
        self._states.settle()

    @torch.no_grad()
    def outputs(self, run: Runner | None = None) -> Float[Tensor, "count seqlen width"]:
        """block(hidden), where the hidden states live, or what else `run` makes of them."""
        found, start = self._states.room_beside(), 0
        for entering, leaving in self._run_all(run or self.run):
            found[start : start + len(entering)] = leaving
            start += len(entering)
        return found

    def _run_all(self, run: Runner) -> Iterator[tuple[Tensor, Tensor]]:
        """`run` of all batches, in smaller ones from where the device runs out of memory."""
        done = 0
        while done < len(self.hidden):
            batches = range(done // self.batch_size, len(self._states.batches()))
            try:
                for entering, leaving in run(batches):
                    self._check(entering, leaving)
                    yield entering, leaving
                    done += len(entering)
                continue
            except torch.OutOfMemoryError:
                pass  # what its frames hold is free only after this clause
            self._states.halve(self.name)

    def run(
        self, batches: Sequence[int] | None = None, *, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The hidden states of each of these batches (None: all), and what the block makes of them.

        With a dtype, whatever the block is handed is cast to it; the block itself is not.
        """
        yield from self._run(self.module, self._states.batches(), batches, dtype)

    def _run(
        self,
        module: nn.Module,
        entering: Sequence[Tensor],
        batches: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        calls = self._states.calls(self.index)
        moved: dict[int, Tensor] = {}  # what one batch shares with the next is moved once
        for i in range(len(entering)) if batches is None else batches:
            call = calls[i]
            moved = {k: _cast(x, dtype) for k, x in call.on(self._device, moved).items()}
            # A copy: some blocks add to their inputs in place.
            hidden = entering[i].to(
                self._device,
                dtype or entering[i].dtype,
                copy=True,
                non_blocking=self._states.pinned,
            )
            try:
                output = call.run(module, hidden, moved)
            except AttributeError as error:
                raise self._reads_inside(error) from error
            yield entering[i], output[0] if isinstance(output, tuple) else output

    def _reads_inside(self, error: AttributeError) -> Exception:
        """Why a block with packed matrices fails that does more with a layer than call it."""
        if not isinstance(error.obj, QuantizedLinear | StackedLinear):
            return error
        return UnsupportedModel(
            f"{self.name} reads the {error.name} of a matrix without calling it, which a packed "
            "one does not have; give another model"
        )

    def _check(self, entering: Tensor, leaving: Tensor) -> None:
        if leaving.shape != entering.shape or leaving.dtype != entering.dtype:
            raise UnsupportedModel(
                f"{self.name} turns hidden states of {tuple(entering.shape)} {entering.dtype} "
                f"into {tuple(leaving.shape)} {leaving.dtype}; they must stay alike"
            )


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.to(dtype) if dtype is not None and x.is_floating_point() else x
