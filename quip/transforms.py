"""Changes of basis that make W and H easy to round, applied structurally and undone exactly.

W becomes W~ = A W B^-1 and H becomes B H B^T, so that tr(W H W^T) keeps its value and
A^-1 W~ (B x) = W x. `Rescale` is a diagonal B; `Kronecker` has orthogonal A and B, each
p x q blocks of small random rotations around a permutation: O(m n (p + q)), never n x n.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from quip.rotation import STORED, Rotation


@runtime_checkable
class Transform(Protocol):
    """A frozen change of basis; its laws are in tests/laws.py."""

    @property
    def stored_bits(self) -> int:
        """Bits that the transform takes in a file."""
        ...

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]: ...

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]: ...

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """B x: activations entering."""
        ...

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        """A^-1 y: activations leaving."""
        ...


Draw = Callable[[Tensor, Tensor, torch.Generator], Transform]


@dataclass(frozen=True)
class Chain:
    """Transforms one after the other."""

    links: Sequence[Transform] = ()

    @property
    def stored_bits(self) -> int:
        return sum(link.stored_bits for link in self.links)

    @classmethod
    def draw(
        cls, draws: Sequence[Draw], W: Tensor, H: Tensor, rng: torch.Generator
    ) -> tuple["Chain", Tensor, Tensor]:
        """Draw each transform for what the ones before it left; also returns W and H after all."""
        links = []
        for draw in draws:
            links.append(draw(W, H, rng))
            W, H = links[-1].apply(W, H)
        return cls(tuple(links)), W, H

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        for link in self.links:
            W, H = link.apply(W, H)
        return W, H

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        for link in reversed(self.links):
            W_hat = link.undo(W_hat)
        return W_hat

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        for link in self.links:
            x = link.input(x)
        return x

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        for link in reversed(self.links):
            y = link.output(y)
        return y


@dataclass(frozen=True)
class Rescale:
    """W diag(r), diag(r)^-1 H diag(r)^-1 (QuIP, Algorithm 1, line 4)."""

    r: Float[Tensor, "n"]

    @classmethod
    def draw(cls, W: Tensor, H: Tensor, rng: torch.Generator) -> "Rescale":
        """r_j = (H_jj / (W^T W)_jj)^(1/4), the minimiser of tr(H) |W|_F^2.

        A column of W that is zero counts as an average one, and so does an input that always is:
        any positive r would do, but a small one would blow up what undo makes of that column.
        """
        r = (_filled(H.diagonal()) / _filled(W.square().sum(0))).pow(0.25)
        return cls((r / r.mean()).clamp_min(1e-8).to(STORED).to(W.dtype))

    @property
    def stored_bits(self) -> int:
        return self.r.numel() * STORED.itemsize * 8

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        return W * self.r, H / self.r / self.r[:, None]

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return W_hat / self.r.to(W_hat)

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return x / self.r.to(x)

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return y


@dataclass(frozen=True)
class Kronecker:
    """R_out W R_in^T, R_in H R_in^T with random orthogonal R (QuIP, Algorithm 1, line 5)."""

    R_out: Rotation
    R_in: Rotation

    @classmethod
    def draw(
        cls,
        W: Tensor,
        H: Tensor,
        rng: torch.Generator,
        *,
        blocked: bool = False,
        permute: bool = True,
    ) -> "Kronecker":
        """Two rotations as `Rotation.draw` makes them.

        R_out draws no permutation of its output: that would only shuffle the rows, which are
        rounded independently.
        """
        R_in = Rotation.draw(W.shape[1], rng, blocked=blocked, mix=permute, shuffle=permute)
        R_out = Rotation.draw(W.shape[0], rng, blocked=blocked, mix=permute, shuffle=False)
        return cls(R_out.to(W.device), R_in.to(W.device))

    @property
    def stored_bits(self) -> int:
        return self.R_out.stored_bits + self.R_in.stored_bits

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        W = self.R_out.rotate(self.R_in.rotate(W).T).T
        return W, self.R_in.rotate(self.R_in.rotate(H).T)

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return self.R_in.invert(self.R_out.invert(W_hat.T).T)

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self.R_in.rotate(x)

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return self.R_out.invert(y)


def _filled(sizes: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Zeros replaced by the mean of all, or by 1 if there is nothing else."""
    return torch.where(sizes > 0, sizes, sizes.mean() if bool(sizes.any()) else 1.0)


draw_blocked = partial(Kronecker.draw, blocked=True)
draw_blocked_unpermuted = partial(Kronecker.draw, blocked=True, permute=False)
