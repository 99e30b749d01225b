"""What a change of basis does to activations, in as few passes over them as it can."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from quip.kernels import hadamard
from quip.transforms.base import Chain, Transform
from quip.transforms.hadamard import Hadamard
from quip.transforms.rescale import Rescale


@dataclass(frozen=True)
class Vectors:
    """B x for activations x, and diag(scales) A^-1 y for what a matrix makes of them.

    Factors of inputs and outputs beside a Hadamard matrix, casts too, are one pass with it.
    """

    chain: Chain
    scales: Float[Tensor, " m"] | None
    turn: Hadamard | None  # all of it, for vectors of float32 or less

    @classmethod
    def of(cls, chain: Chain, scales: Float[Tensor, " m"] | None = None) -> "Vectors":
        """What the chain does to vectors, and the scales of rows after it."""
        turn = _turn(chain.links)
        if turn is not None and scales is not None:
            turn = replace(turn, signs_out=turn.signs_out * scales)
        return cls(chain, scales, turn)

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """B x, in float32 at least."""
        if self.turn is None or x.dtype == torch.float64:
            return self.chain.input(x.to(torch.promote_types(x.dtype, torch.float32)))
        signs, block = self.turn.signs_in, self.turn.block
        return hadamard.invert(x, block=block, signs=signs, dtype=torch.float32)

    def output(self, y: Float[Tensor, "*batch m"], dtype: torch.dtype) -> Float[Tensor, "*batch m"]:
        """diag(scales) A^-1 y, rounded to dtype at the end."""
        if self.turn is None or y.dtype == torch.float64:
            y = self.chain.output(y)
            return (y if self.scales is None else y * self.scales).to(dtype)
        signs, block = self.turn.signs_out, self.turn.block
        return hadamard.rotate(y, block=block, signs=signs, dtype=dtype)


def _turn(links: Sequence[Transform]) -> Hadamard | None:
    """The one Hadamard transform that does to vectors what the links do, if there is one."""
    match tuple(links):
        case (Hadamard() as turn,):
            return turn
        case (Rescale(r), Hadamard() as turn):
            return replace(turn, signs_in=turn.signs_in / r.to(turn.signs_in))
    return None
