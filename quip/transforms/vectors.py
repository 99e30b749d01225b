"""What a change of basis does to activations, in as few passes over them as it can."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from quip.kernels import hadamard
from quip.transforms.base import Chain, Transform
from quip.transforms.hadamard import Hadamard
from quip.transforms.kronecker import Kronecker
from quip.transforms.rescale import OutputRescale, Rescale


@dataclass(frozen=True)
class Vectors:
    """B x for activations x, and diag(scales) A^-1 y for what a matrix makes of them.

    Factors of inputs and outputs beside a rotation, casts too, are one pass with it.
    """

    chain: Chain
    scales: Float[Tensor, " m"] | None
    turn: "_Signed | _Scaled | None"  # all of it, for vectors of float32 or less

    @classmethod
    def of(cls, chain: Chain, scales: Float[Tensor, " m"] | None = None) -> "Vectors":
        """What the chain does to vectors, and the scales of rows after it."""
        return cls(chain, scales, _in_one(chain.links, scales))

    def input(
        self, x: Float[Tensor, "*batch n"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch n"]:
        """B x, in float32 at least, then cast to dtype if one is given."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.turn is None or x.dtype == torch.float64:
            return self.chain.input(x.to(wide)).to(wide if dtype is None else dtype)
        return self.turn.input(x, wide if dtype is None else dtype)

    def output(self, y: Float[Tensor, "*batch m"], dtype: torch.dtype) -> Float[Tensor, "*batch m"]:
        """diag(scales) A^-1 y, rounded to dtype at the end."""
        if self.turn is None or y.dtype == torch.float64:
            y = self.chain.output(y.to(torch.promote_types(y.dtype, torch.float32)))
            return (y if self.scales is None else y * self.scales).to(dtype)
        return self.turn.output(y, dtype)


@dataclass(frozen=True)
class _Signed:
    """A Hadamard transform whose signs hold the factors."""

    transform: Hadamard

    def input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        signs, block = self.transform.signs_in, self.transform.block
        return hadamard.invert(x, block=block, signs=signs, dtype=dtype)

    def output(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        signs, block = self.transform.signs_out, self.transform.block
        return hadamard.rotate(y, block=block, signs=signs, dtype=dtype)


@dataclass(frozen=True)
class _Scaled:
    """A Kronecker product between factors."""

    transform: Kronecker
    before: Float[Tensor, " n"] | None
    after: Float[Tensor, " m"] | None

    def input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.transform.R_in.rotate_vectors(x, self.before, dtype)

    def output(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return self.transform.R_out.invert_vectors(y, self.after, dtype)


def _in_one(
    links: Sequence[Transform], scales: Float[Tensor, " m"] | None
) -> _Signed | _Scaled | None:
    """One rotation that does to vectors what the links and the scales do, if there is one."""
    *factors, turn = links or (None,)
    before = [link.r for link in factors if isinstance(link, Rescale)]
    after = [link.r for link in factors if isinstance(link, OutputRescale)]
    if len(factors) > len(before) + len(after) or max(len(before), len(after)) > 1:
        return None
    r = before[0] if before else None
    if after:
        scales = after[0].float() if scales is None else scales * after[0].float()
    match turn:
        case Hadamard():
            return _Signed(_between(turn, r, scales))
        case Kronecker():
            return _Scaled(turn, None if r is None else 1 / r.float(), scales)
    return None


def _between(turn: Hadamard, r: Tensor | None, scales: Tensor | None) -> Hadamard:
    signs_in, signs_out = turn.signs_in, turn.signs_out
    return replace(
        turn,
        signs_in=signs_in if r is None else signs_in / r.to(signs_in),
        signs_out=signs_out if scales is None else signs_out * scales,
    )
