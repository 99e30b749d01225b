"""What the loss feels of a block's outputs: H_O for two-sided rounding, and a judge of the outcome.

Of each window G = sum_t g_t x_t^T, the gradient of its loss for the matrix W. Rounding W to W + E
adds about 1/2 <E, G>^2 to the divergence from the model as it was, whose expectation a Kronecker
product stands in for: 1/2 tr(H_O E H_I E^T) with H_O ~ E[G G^T] (YAQA's sketch B,
arXiv 2505.22988). From few windows H_O is noisy, and may do harm. So each matrix is rounded with it
and without, and the windows that were held out of H_O say which is kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn

from quip.model.block_module import BlockModule
from quip.model.matrices import Matrix
from quip.model.sensitivity.crossings import Crossing
from quip.model.sensitivity.labels import SCALE


@dataclass(frozen=True, kw_only=True)
class Side:
    """What the loss feels of the outputs of a matrix, or of several of one input, in nats."""

    H_O: Float64[Tensor, "m m"]  # E[G G^T] / n
    held: Float32[Tensor, "windows m n"]  # G of each window that H_O has not seen

    def damage(self, E: Float[Tensor, "m n"]) -> Float[Tensor, ""]:
        """1/2 E[<E, G>^2] over the windows held out: nats that a window loses by the error E."""
        return (self.held * E).sum((1, 2)).double().square().mean() / 2

    def of(self, rows: slice) -> "Side":
        """The side of some of the rows."""
        return replace(self, H_O=self.H_O[rows, rows], held=self.held[:, rows])

    def scaled(self, scales: Float[Tensor, " m"]) -> "Side":
        """The side of a matrix whose rows are multiplied by the scales after it: W / scales."""
        both = scales.double()[:, None] * scales.double()
        return replace(self, H_O=self.H_O * both, held=self.held * scales[:, None])


class Sides:
    """The sides of a model's matrices, found for one block at a time."""

    def __init__(self, crossings: Sequence[Sequence[Crossing]], *, held: int) -> None:
        """The last `held` windows are kept out of H_O."""
        self._crossings, self._held = crossings, held

    @torch.enable_grad()
    def of(self, block: BlockModule, groups: Sequence[Sequence[str]]) -> dict[str, Side]:
        """The side of each group of matrices, of one input, by the name of its first.

        Its rows are those of the matrices in their order. The block must still be as it was.
        Experts have none.
        """
        units = self._crossings[block.index]
        seen = sum(len(unit.entering) for unit in units) - self._held
        sums = {group[0]: _Sum() for group in groups if not block.is_expert(group[0])}
        window = 0
        for unit in units:
            watched = [group for group in groups if group[0] in sums]
            for inputs, gradients in _windows_of(block, watched, unit):
                for group in watched:
                    g = torch.cat([gradients[name] for name in group], -1)
                    sums[group[0]].add(g.mT @ inputs[group[0]] / SCALE, held=window >= seen)
                window += 1
        return {name: found.side(seen) for name, found in sums.items()}


class _Sum:
    """The sum of G G^T, and the G that are held out of it."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._held: list[Tensor] = []

    def add(self, G: Float32[Tensor, "m n"], *, held: bool) -> None:
        if held:
            self._held.append(G)
        else:
            term = (G @ G.mT).double()
            self._total = term if self._total is None else self._total.add_(term)

    def side(self, windows: int) -> Side:
        assert self._total is not None
        return Side(
            H_O=self._total / (windows * self._held[0].shape[1]), held=torch.stack(self._held)
        )


def _windows_of(
    block: BlockModule, groups: Sequence[Sequence[str]], unit: Crossing
) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
    """Of each window: inputs of the groups, and gradients at the outputs of their matrices."""
    device, inputs, gradients = block.device, dict[str, Tensor](), dict[str, Tensor]()

    def see(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Tensor], y: Tensor) -> None:
        inputs[name] = (args[0] if args else next(iter(kwargs.values()))).detach().float()
        y.register_hook(partial(gradients.__setitem__, name))

    leaf = unit.entering.to(device, copy=True).requires_grad_()
    matrices = block.matrices()
    with _watched({name: matrices[name] for group in groups for name in group}, see):
        output = unit.call.run(block.module, leaf.clone(), unit.call.on(device, {}))
    y = output[0] if isinstance(output, tuple) else output
    torch.autograd.grad(y, leaf, unit.gradient.to(device))
    shape = unit.entering.shape[:2]
    for window in range(len(leaf)):
        yield (
            {group[0]: inputs[group[0]].reshape(*shape, -1)[window] for group in groups},
            {name: g.float().reshape(*shape, -1)[window] for name, g in gradients.items()},
        )


@contextmanager
def _watched(matrices: Mapping[str, Matrix], see: Callable[..., None]) -> Iterator[None]:
    """Inside, `see` is told of each forward pass of these matrices, by their name."""
    hooks = [
        matrix.module.register_forward_hook(partial(see, name), with_kwargs=True)
        for name, matrix in matrices.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
