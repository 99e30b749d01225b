"""Changes of basis that make W and H easy to round, applied structurally and undone exactly.

W becomes W~ = A W B^-1 and H becomes B H B^T, so that tr(W H W^T) keeps its value and
A^-1 W~ (B x) = W x. `Rescale` is a diagonal B; `Kronecker` has orthogonal A and B, each
p x q blocks of small random rotations around a permutation: O(m n (p + q)), never n x n.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

STORED = torch.bfloat16  # what transforms keep in a file; drawn values are rounded to it


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

        A column of W that is zero counts as an average one; any positive r would do.
        """
        norms = W.square().sum(0)
        norms = torch.where(norms > 0, norms, norms.mean().clamp_min(torch.finfo(W.dtype).tiny))
        r = (H.diagonal() / norms).pow(0.25)
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

    R_out: "Rotation"
    R_in: "Rotation"

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


draw_blocked = partial(Kronecker.draw, blocked=True)
draw_blocked_unpermuted = partial(Kronecker.draw, blocked=True, permute=False)


@dataclass(frozen=True)
class Rotation:
    """x -> P' (L (x) R) P x on n = p q numbers; P and P' permute.

    L holds one p x p factor, R one q x q factor; or, blocked, one factor for each of the q
    columns of the p x q reshape and one for each of its p rows.
    """

    left: "Haar"
    right: "Haar"
    mix: Tensor | None = None  # P as indices
    shuffle: Tensor | None = None  # P' as indices

    @classmethod
    def draw(
        cls, n: int, rng: torch.Generator, *, blocked: bool, mix: bool, shuffle: bool
    ) -> "Rotation":
        p, q = balanced_factors(n)
        return cls(
            Haar.draw(p, rng, count=q if blocked else 1),
            Haar.draw(q, rng, count=p if blocked else 1),
            torch.randperm(n, generator=rng) if mix else None,
            torch.randperm(n, generator=rng) if shuffle else None,
        )

    def to(self, device: torch.device | str) -> "Rotation":
        indices = (None if i is None else i.to(device) for i in (self.mix, self.shuffle))
        return Rotation(self.left.to(device), self.right.to(device), *indices)

    @property
    def stored_bits(self) -> int:
        index_bits = sum(
            i.numel() * (16 if i.numel() <= 2**15 else 32)
            for i in (self.mix, self.shuffle)
            if i is not None
        )
        return self.left.stored_bits + self.right.stored_bits + index_bits

    def rotate(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R x on the last axis."""
        L, R = self.left.matrices.to(x), self.right.matrices.to(x)
        if self.mix is not None:
            x = x[..., self.mix]
        y = _columns(L, x.reshape(-1, L.shape[-1], R.shape[-1]))
        y = _columns(R, y.mT).mT.reshape(x.shape)
        return y if self.shuffle is None else y[..., self.shuffle]

    def invert(self, y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R^T y on the last axis."""
        L, R = self.left.matrices.to(y).mT, self.right.matrices.to(y).mT
        if self.shuffle is not None:
            y = y[..., torch.argsort(self.shuffle)]
        x = _columns(R, y.reshape(-1, L.shape[-1], R.shape[-1]).mT).mT
        x = _columns(L, x).reshape(y.shape)
        return x if self.mix is None else x[..., torch.argsort(self.mix)]


@dataclass(frozen=True)
class Haar:
    """Haar-distributed orthogonal matrices as Householder vectors, count of p x p.

    The vectors are rounded to 16 bits before the matrices are formed, and any vector makes an
    exact reflection: what a file holds (p (p - 1) / 2 numbers and p signs) rebuilds matrices
    that are orthogonal to machine precision (Stewart, 1980).
    """

    vectors: Float[Tensor, "count p p"]  # below the diagonal; the diagonal is 1 by convention
    signs: Float[Tensor, "count p"]

    @classmethod
    def draw(cls, p: int, rng: torch.Generator, *, count: int = 1) -> "Haar":
        gaussian = torch.randn(count, p, p, generator=rng, dtype=torch.float64)
        factored, _ = torch.geqrf(gaussian)
        signs = torch.where(factored.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).double()
        return cls(factored.tril(-1).to(STORED).double(), signs)

    def to(self, device: torch.device | str) -> "Haar":
        return Haar(self.vectors.to(device), self.signs.to(device))

    @property
    def stored_bits(self) -> int:
        count, p, _ = self.vectors.shape
        return count * (p * (p - 1) // 2 * STORED.itemsize * 8 + p)

    @cached_property
    def matrices(self) -> Float[Tensor, "count p p"]:
        """H_1 ... H_p diag(signs), H_i = I - 2 v v^T / |v|^2."""
        scales = 2 / (1 + self.vectors.square().sum(1))
        scales[:, -1] = 0  # the last vector is (1): a sign, which `signs` holds already
        return torch.linalg.householder_product(self.vectors, scales) * self.signs[:, None, :]


def balanced_factors(n: int) -> tuple[int, int]:
    """(p, q) with p q = n, p <= q, as near to sqrt(n) as the divisors of n allow."""
    p = next(p for p in range(math.isqrt(n), 0, -1) if n % p == 0)
    return p, n // p


def _columns(A: Tensor, x: Tensor) -> Tensor:
    """A_j times column j of each matrix of x, [batch, p, q]; a single A serves all columns."""
    if len(A) == 1:
        return (x.mT @ A[0].T).mT
    return torch.einsum("jik,bkj->bij", A, x)
