"""QuIP's rotations: Kronecker products of small random orthogonal matrices."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quip.stored import Options
from quip.transforms.haar import FILE_DTYPE
from quip.transforms.panels import turn_columns, turn_rows
from quip.transforms.rotation import Rotation

TENSORS = {"factors": FILE_DTYPE, "permutations": torch.int32}


@dataclass(frozen=True)
class Kronecker:
    """R_out W R_in^T, R_in H R_in^T with random orthogonal R (QuIP, Algorithm 1, line 5)."""

    R_out: Rotation
    R_in: Rotation

    def options(self) -> Options:
        haars = [h for R in (self.R_in, self.R_out) for h in (R.left, R.right)]
        blocked = any(len(haar.signs) > 1 for haar in haars)
        return {"blocked": blocked, "permute": self.R_in.mix is not None}

    def tensors(self) -> dict[str, Tensor]:
        pairs = zip(self.R_in.stored(), self.R_out.stored(), strict=True)
        parts = [torch.cat(pair) for pair in pairs]
        return {name: x for name, x in zip(TENSORS, parts, strict=True) if x.numel()}

    @classmethod
    def empty(cls, m: int, n: int, *, blocked: bool, permute: bool) -> dict[str, Tensor]:
        pairs = zip(*_sizes(m, n, blocked, permute), strict=True)
        return {
            name: torch.empty(sum(pair), dtype=dtype, device="meta")
            for (name, dtype), pair in zip(TENSORS.items(), pairs, strict=True)
            if sum(pair)
        }

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], m: int, n: int, *, blocked: bool, permute: bool
    ) -> "Kronecker":
        sizes_in, _ = _sizes(m, n, blocked, permute)
        parts = [tensors.get(name, torch.empty(0)) for name in TENSORS]
        halves = [(x[:size], x[size:]) for x, size in zip(parts, sizes_in, strict=True)]
        of_in, of_out = zip(*halves, strict=True)
        R_in = Rotation.restored(n, of_in, blocked=blocked, mix=permute, shuffle=permute)
        return cls(Rotation.restored(m, of_out, blocked=blocked, mix=permute, shuffle=False), R_in)

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], *, in_place: bool = False
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        H = H if in_place else H.clone()
        turn_columns(H, self.R_in.rotate_rows)
        turn_rows(H, self.R_in.rotate)
        return self.R_in.rotate(self.R_out.rotate_rows(W)), H

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return self.R_in.invert(self.R_out.invert_rows(W_hat))

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self.R_in.rotate_vectors(x)

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return self.R_out.invert_vectors(y)


@dataclass(frozen=True)
class KroneckerDraw:
    """Random rotations: one factor on each side, or `blocked`; with permutations, or without."""

    blocked: bool = False
    permute: bool = True

    def check(self, m: int, n: int) -> None:
        """Every size has a rotation, a prime one a single factor."""

    def __call__(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], rng: torch.Generator
    ) -> Kronecker:
        """Two rotations as `Rotation.draw` makes them.

        R_out draws no permutation of its output: that would only shuffle the rows, which are
        rounded independently.
        """
        blocked, permute = self.blocked, self.permute
        R_in = Rotation.draw(W.shape[1], rng, blocked=blocked, mix=permute, shuffle=permute)
        R_out = Rotation.draw(W.shape[0], rng, blocked=blocked, mix=permute, shuffle=False)
        return Kronecker(R_out, R_in)


def _sizes(m: int, n: int, blocked: bool, permute: bool) -> tuple[tuple[int, int], ...]:
    """The lengths of what R_in and R_out each add to the tensors of TENSORS."""
    return (
        Rotation.sizes(n, blocked=blocked, mix=permute, shuffle=permute),
        Rotation.sizes(m, blocked=blocked, mix=permute, shuffle=False),
    )
