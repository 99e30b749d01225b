"""Random orthogonal matrices on n = p q numbers that cost O(p + q) a number, not O(n).

A rotation reshapes a vector row-major to p x q and multiplies it by small Haar-distributed
matrices from both sides, between two permutations (QuIP, section 4.2 and Lemma 5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from quip.errors import QuipError
from quip.kernels import kronecker
from quip.kernels.bits import pack, unpack, words
from quip.transforms.haar import Haar


@dataclass(frozen=True)
class Rotation:
    """x -> P' (L (x) R) P x on n = p q numbers; P and P' permute.

    L holds one p x p factor, R one q x q factor; or, blocked, one factor for each of the q
    columns of the p x q reshape and one for each of its p rows.
    """

    left: Haar
    right: Haar
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

    @staticmethod
    def sizes(n: int, *, blocked: bool, mix: bool, shuffle: bool) -> tuple[int, int]:
        """The lengths of the two tensors of `stored`, for a rotation of n numbers."""
        p, q = balanced_factors(n)
        left, right = (q, p) if blocked else (1, 1)
        factors = left * p * (p + 1) // 2 + right * q * (q + 1) // 2
        return factors, (mix + shuffle) * words(n, index_bits(n))

    def stored(self) -> tuple[Tensor, Tensor]:
        """What a file holds: factors [bfloat16] and permutations [int32 words], both flat.

        First the left factors, then the right ones; first `mix`, then `shuffle`.
        """
        indices = [i for i in (self.mix, self.shuffle) if i is not None]
        packed = [pack(i.cpu(), index_bits(len(i))) for i in indices]
        empty = torch.empty(0, dtype=torch.int32)
        return torch.cat([self.left.stored, self.right.stored]), torch.cat([empty, *packed])

    @classmethod
    def restored(
        cls, n: int, stored: Sequence[Tensor], *, blocked: bool, mix: bool, shuffle: bool
    ) -> "Rotation":
        """The rotation whose `stored` this is. Raises QuipError if its tensors make none."""
        factors, permutations = (x.cpu() for x in stored)
        p, q = balanced_factors(n)
        border = (q if blocked else 1) * p * (p + 1) // 2
        packed = iter(permutations.split(words(n, index_bits(n))))
        indices = [permutation(next(packed), n) if given else None for given in (mix, shuffle)]
        return cls(Haar.restored(factors[:border], p), Haar.restored(factors[border:], q), *indices)

    def rotate(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R x on the last axis."""
        L, R = self.left.like(x), self.right.like(x)
        mix, _, shuffle, _ = self._indices(x.device)
        if mix is not None:
            x = x.index_select(-1, mix)
        y = _columns(L, x.reshape(-1, L.shape[-1], R.shape[-1]))
        y = _columns(R, y.mT).mT.reshape(x.shape)
        return y if shuffle is None else y.index_select(-1, shuffle)

    def invert(self, y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R^T y on the last axis."""
        L, R = self.left.like(y).mT, self.right.like(y).mT
        _, unmix, _, unshuffle = self._indices(y.device)
        if unshuffle is not None:
            y = y.index_select(-1, unshuffle)
        x = _columns(R, y.reshape(-1, L.shape[-1], R.shape[-1]).mT).mT
        x = _columns(L, x).reshape(y.shape)
        return x if unmix is None else x.index_select(-1, unmix)

    def rotate_vectors(
        self,
        x: Float[Tensor, "*batch n"],
        factors: Float[Tensor, " n"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "*batch n"]:
        """R diag(factors) x by the fastest form, in float32 at least, then cast to dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        dtype = wide if dtype is None else dtype
        if self._blocked:
            x = x.to(wide)
            return self.rotate(x if factors is None else x * factors).to(dtype)
        left, right, _, _ = self._factors(wide, x.device)
        mix, _, shuffle, _ = self._indices(x.device)
        return kronecker.rotate_scaled(x, left, right, mix, shuffle, factors, None, dtype=dtype)

    def invert_vectors(
        self,
        y: Float[Tensor, "*batch n"],
        factors: Float[Tensor, " n"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "*batch n"]:
        """diag(factors) R^T y by the fastest form, in float32 at least, then cast to dtype.

        A dtype of None is that of y.
        """
        dtype, wide = (
            y.dtype if dtype is None else dtype,
            torch.promote_types(y.dtype, torch.float32),
        )
        if self._blocked:
            x = self.invert(y.to(wide))
            return (x if factors is None else x * factors).to(dtype)
        _, _, left, right = self._factors(wide, y.device)
        _, unmix, _, unshuffle = self._indices(y.device)
        return kronecker.rotate_scaled(y, left, right, unshuffle, unmix, None, factors, dtype=dtype)

    @cached_property
    def _blocked(self) -> bool:
        return len(self.left.signs) > 1 or len(self.right.signs) > 1

    def rotate_rows(self, W: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """R W: `rotate` on the first axis, without a transposition."""
        L, R = self.left.like(W), self.right.like(W)
        mix, _, shuffle, _ = self._indices(W.device)
        if mix is not None:
            W = W.index_select(0, mix)
        X = R @ _rows(L, W.reshape(L.shape[-1], R.shape[-1], -1))
        X = X.reshape(W.shape)
        return X if shuffle is None else X.index_select(0, shuffle)

    def invert_rows(self, W: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """R^T W: `invert` on the first axis."""
        L, R = self.left.like(W).mT, self.right.like(W).mT
        _, unmix, _, unshuffle = self._indices(W.device)
        if unshuffle is not None:
            W = W.index_select(0, unshuffle)
        X = _rows(L, R @ W.reshape(L.shape[-1], R.shape[-1], -1))
        X = X.reshape(W.shape)
        return X if unmix is None else X.index_select(0, unmix)

    def _indices(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """mix, its inverse, shuffle and its inverse, on the device."""
        if device not in self._moved:
            given = (self.mix, self.shuffle)
            with torch.inference_mode(False):
                both = [x for i in given for x in (i, None if i is None else torch.argsort(i))]
                moved = (None if i is None else i.int().to(device) for i in both)
                self._moved[device] = tuple(moved)
        return self._moved[device]

    def _factors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """L, R^T, L^T and R of a rotation without blocks, each contiguous."""
        key = dtype, device
        if key not in self._turned:
            with torch.inference_mode(False):
                like = torch.empty(0, dtype=dtype, device=device)
                L, R = self.left.like(like)[0], self.right.like(like)[0]
                self._turned[key] = tuple(A.contiguous() for A in (L, R.T, L.T, R))
        return self._turned[key]

    @cached_property
    def _turned(self) -> dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]]:
        return {}

    @cached_property
    def _moved(self) -> dict[torch.device, tuple[Tensor | None, ...]]:
        return {}


def balanced_factors(n: int) -> tuple[int, int]:
    """(p, q) with p q = n, p <= q, as near to sqrt(n) as the divisors of n allow."""
    p = next(p for p in range(math.isqrt(n), 0, -1) if n % p == 0)
    return p, n // p


def _columns(A: Tensor, x: Tensor) -> Tensor:
    """A_j times column j of each matrix of x, [batch, p, q]; a single A serves all columns."""
    if len(A) == 1:
        return (x.mT @ A[0].T).mT
    return torch.einsum("jik,bkj->bij", A, x)


def index_bits(n: int) -> int:
    """The bits of an index of n numbers."""
    return max(1, (n - 1).bit_length())


def permutation(packed: Int32[Tensor, " words"], n: int) -> Int32[Tensor, " n"]:
    """The permutation of n numbers that was packed. Raises QuipError for indices that are none."""
    indices = unpack(packed, index_bits(n), n).int()
    if not torch.equal(indices.sort().values, torch.arange(n, dtype=torch.int32)):
        raise QuipError(f"what should be a permutation of {n} numbers is none: the file is damaged")
    return indices


def _rows(A: Tensor, X: Tensor) -> Tensor:
    """A_j times X[:, j], [p, m], for each j of X, [p, q, m]; a single A serves all j."""
    if len(A) == 1:
        return (A[0] @ X.flatten(1)).view(X.shape)
    return torch.einsum("jik,kjm->ijm", A, X)
