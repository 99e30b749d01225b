"""Random orthogonal matrices on n = p q numbers that cost O(p + q) a number, not O(n).

A rotation reshapes a vector row-major to p x q and multiplies it by small Haar-distributed
matrices from both sides, between two permutations (QuIP, section 4.2 and Lemma 5).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

STORED = torch.bfloat16  # what a file keeps; drawn values are rounded to it


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
