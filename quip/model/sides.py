"""What the loss feels of a block's outputs: H_O for two-sided rounding, and a judge of the outcome.

Of each window G = sum_t g_t x_t^T, the gradient of its loss for the matrix W. Rounding W to W + E
adds about 1/2 <E, G>^2 to the divergence from the model as it was, whose expectation a Kronecker
product stands in for: 1/2 tr(H_O E H_I E^T) with H_O ~ E[G G^T] (YAQA's sketch B,
arXiv 2505.22988). From few windows H_O is noisy, and may do harm. So each matrix is rounded with it
and without, and the windows that were held out of H_O say which is kept: by 1/2 sum_t (g_t^T E
x_t)^2, token by token. Squares of their sums over a window, one number for each, say too little:
of eight windows of SmolLM2-135M they put the same error two or three times too high or too low.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor, nn

from quip.errors import UsageError
from quip.matrix.recipe import Recipe
from quip.model.block_module import BlockModule
from quip.model.inputs import Inputs, watched
from quip.model.matrices import Matrix
from quip.model.sensitivity.crossings import Crossing, crossings
from quip.model.sensitivity.labels import SCALE
from quip.model.sensitivity.measure import Passing
from quip.model.team import ALONE

LEAST = 4  # windows; of so many one is held out
TWO = 2  # windows that are held out at least


@dataclass(frozen=True, kw_only=True)
class Side:
    """What the loss feels of the outputs of the matrices of one input, in nats.

    `rows` are those of each matrix, by its name.
    """

    rows: Mapping[str, slice]
    H_O: Float64[Tensor, "m m"]  # E[G G^T] / n
    x: Float32[Tensor, "tokens n"]  # inputs in the windows that H_O has not seen
    g: Float32[Tensor, "tokens m"]  # and gradients at the outputs

    def damage(self, E: Float[Tensor, "m n"]) -> Float[Tensor, ""]:
        """1/2 E[(g_t^T E x_t)^2] over the tokens held out: nats that one loses by the error E."""
        felt = ((self.x @ E.to(self.x).T) * self.g).sum(1)
        return felt.double().square().mean() / 2

    def of(self, names: Sequence[str]) -> "Side":
        """The side of these matrices, in this order."""
        places = torch.arange(len(self.H_O), device=self.H_O.device)
        at = torch.cat([places[self.rows[name]] for name in names])
        rows = _slices({name: len(places[self.rows[name]]) for name in names})
        return replace(self, rows=rows, H_O=self.H_O[at][:, at], g=self.g[:, at])

    def scaled(self, scales: Float[Tensor, " m"]) -> "Side":
        """The side of a matrix whose rows are multiplied by the scales after it: W / scales."""
        both = scales.double()[:, None] * scales.double()
        return replace(self, H_O=self.H_O * both, g=self.g * scales)


class Sides:
    """The sides of a model's matrices, found for one block at a time."""

    def __init__(self, crossings: Sequence[Sequence[Crossing]], *, held: int) -> None:
        """The last `held` windows are kept out of H_O."""
        self._crossings, self._held = crossings, held

    @classmethod
    def measured(
        cls, model: nn.Module, tokens: Int[Tensor, "count seqlen"], how: Passing
    ) -> "Sides":
        """By one pass forward and back over all windows, whatever the team. Raises UsageError."""
        if len(tokens) < LEAST:
            raise UsageError(
                f"--two_sided with {len(tokens)} windows: at least {LEAST} are needed, of which "
                f"{TWO} are held out; give more (--nsamples)"
            )
        held = max(TWO, len(tokens) // LEAST)
        return cls(crossings(model, tokens, replace(how, team=ALONE)), held=held)

    @torch.enable_grad()
    def of(self, block: BlockModule) -> dict[str, Side]:
        """By the name of each matrix but those of experts, the side of its input's matrices.

        The block must still be as it was.
        """
        units = self._crossings[block.index]
        seen = sum(len(unit.entering) for unit in units) - self._held
        matrices = {x: one for x, one in block.matrices().items() if not block.is_expert(x)}
        sums: dict[str, _Sum] = {}
        window = 0
        for unit in units:
            inputs, gradients = _back(block, matrices, unit)
            groups: dict[str, list[str]] = {}
            for name, first in inputs.names.items():
                groups.setdefault(first, []).append(name)
            for row in range(len(unit.entering)):
                for first, names in groups.items():
                    g = torch.cat([gradients[name][row] for name in names], -1)
                    own = sums.setdefault(first, _Sum(names))
                    own.add(inputs.x[first][row], g / SCALE, held=window >= seen)
                window += 1
        found: dict[str, Side] = {}
        for own in sums.values():
            found |= dict.fromkeys(own.names, own.side(matrices, seen))
        return found


def check_two_sided(recipe: Recipe) -> None:
    """Raise UsageError for a recipe whose codebook rounds all rows together."""
    recipe.codebook.part(slice(0, 0))


class _Sum:
    """The sum of G G^T, and the tokens that are held out of it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._total: Tensor | None = None
        self._held: list[tuple[Tensor, Tensor]] = []

    def add(
        self, x: Float32[Tensor, "tokens n"], g: Float32[Tensor, "tokens m"], *, held: bool
    ) -> None:
        if held:
            self._held.append((x.clone(), g))  # of one window, and not all of its batch
        else:
            G = g.T @ x
            term = (G @ G.T).double()
            self._total = term if self._total is None else self._total.add_(term)

    def side(self, matrices: Mapping[str, Matrix], windows: int) -> Side:
        assert self._total is not None
        x, g = map(torch.cat, zip(*self._held, strict=True))
        return Side(
            rows=_slices({name: matrices[name].rows for name in self.names}),
            H_O=self._total / (windows * x.shape[1]),
            x=x,
            g=g,
        )


class _Inputs(Inputs):
    """Which matrices are fed by the same tensor, and that tensor: [windows, tokens, n]."""

    def __init__(self) -> None:
        super().__init__()
        self.x: dict[str, Tensor] = {}


def _back(
    block: BlockModule, matrices: Mapping[str, Matrix], unit: Crossing
) -> tuple[_Inputs, Mapping[str, Tensor]]:
    """Inputs of the matrices in a unit, and gradients at their outputs [windows, tokens, m]."""
    shape, inputs, gradients = unit.entering.shape[:2], _Inputs(), dict[str, Tensor]()

    def feel(name: str, g: Tensor) -> None:
        gradients[name] = g.detach().float().reshape(*shape, -1)

    def see(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Tensor], y: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        first = inputs.name(name, x)
        if first == name:
            inputs.x[name] = x.detach().float().reshape(*shape, -1)
        y.register_hook(partial(feel, name))

    leaf = unit.entering.to(block.device, copy=True).requires_grad_()
    with watched(matrices, see):
        output = unit.call.run(block.module, leaf.clone(), unit.call.on(block.device, {}))
    y = output[0] if isinstance(output, tuple) else output
    torch.autograd.grad(y, leaf, unit.gradient.to(block.device))
    return inputs, gradients


def _slices(sizes: Mapping[str, int]) -> dict[str, slice]:
    ends = accumulate(sizes.values())
    return {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}
