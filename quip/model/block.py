"""A decoder block while it is walked over, and the hidden states that enter it."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quip.errors import UnsupportedModel
from quip.matrix.hessian import Hessian
from quip.model.calls import Call
from quip.model.matrices import Matrix
from quip.model.observe import Observer
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
        self.module.set_submodule(name.removeprefix(f"{self.name}."), module, strict=True)


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
        observer, matrices = Observer(), self.matrices()
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
        return observer.hessians(matrices)

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
