"""A decoder block while it is walked over, and the hidden states that enter it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quip.errors import UnsupportedModel
from quip.matrix.hessian import Hessian
from quip.model.matrices import Matrix
from quip.model.observe import Observer
from quip.model.states import States
from quip.packed.exchange import replace
from quip.packed.linear import QuantizedLinear
from quip.packed.stack import StackedLinear


class BlockModule:
    """One decoder block on the device: its matrices, to be replaced one by one."""

    def __init__(self, index: int, name: str, module: nn.Module, *, device: torch.device) -> None:
        self.index, self.name, self.module, self._device = index, name, module, device

    def matrices(self) -> dict[str, Matrix]:
        """Full dotted name -> matrix, for every nn.Linear that has not been replaced."""
        found = (
            Matrix(f"{self.name}.{name}", module)
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear)
        )
        return {matrix.name: matrix for matrix in found}

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module where the matrix of this full dotted name is."""
        module = module.to(self._device).train(self.module.training)
        replace(self.module, name.removeprefix(f"{self.name}."), module)


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
    def batch_size(self) -> int:
        """Windows that pass through the block together."""
        return self._states.batch_size

    @torch.no_grad()
    def observe(self) -> dict[str, Hessian]:
        """The Hessian of every matrix's inputs, from one forward pass of the block as it is.

        Matrices that are fed by the same tensor (q, k and v; gate and up) map to the same
        object. Raises NonFinite or UnsupportedModel, naming the matrix, where inputs are NaN
        or infinite, and where a matrix never ran.
        """
        matrices = self.matrices()
        while True:
            try:
                return self._observe(matrices).hessians(matrices)
            except torch.OutOfMemoryError:
                pass  # what its frames hold is free only after this clause
            self._states.halve(self.name)

    def _observe(self, matrices: Mapping[str, Matrix]) -> Observer:
        observer = Observer()
        hooks = [
            matrix.module.register_forward_pre_hook(partial(observer.see, name), with_kwargs=True)
            for name, matrix in matrices.items()
        ]
        try:
            for _ in self.run():
                observer.forget_inputs()
        finally:
            for hook in hooks:
                hook.remove()
        return observer

    @torch.no_grad()
    def replay(self) -> None:
        """hidden = block(hidden). The walk does this between two blocks."""
        for entering, leaving in self._run_all():
            entering.copy_(leaving, non_blocking=self._states.pinned)
        self._states.settle()

    @torch.no_grad()
    def outputs(self) -> Float[Tensor, "count seqlen width"]:
        """block(hidden), where the hidden states live."""
        found, start = torch.empty_like(self.hidden), 0
        for entering, leaving in self._run_all():
            found[start : start + len(entering)] = leaving
            start += len(entering)
        return found

    def _run_all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`run` of all batches, in smaller ones from where the device runs out of memory."""
        done = 0
        while done < len(self.hidden):
            batches = range(done // self.batch_size, len(self._states.batches()))
            try:
                for entering, leaving in self.run(batches):
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
        entering, calls = self._states.batches(), self._states.calls(self.index)
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
                output = call.run(self.module, hidden, moved)
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
