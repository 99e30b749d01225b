"""Two-sided rounding (YAQA): errors weigh by a second moment of outputs beside that of inputs.

    tr(H_O E H_I E^T),   H_O = (I + U) D (I + U)^T   over rows,   H_I as ever over columns

The sweep stays as it is. Inside a column, rows are rounded block after block too, and each block
receives what those before it left behind:

    z_i = x_i + sum_{j<i} eta_j K[j, i],   eta_j = z_j - w_hat_j,   K = I - (I + U)^-1.

So `Sided` is a codebook like any other, whose rows feel each other; its codes are those of the
codebook inside it. Written as one update for both sides, x = w + U^T e V + U^T e + e V with the V
of H_I (tests/reference_two_sided.py), it gives the same codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks.base import FITTED, Codebook, Decoder, Groups, tiles
from quip.matrix.feedback import running
from quip.matrix.linalg import cholesky

ROWS = 8  # of codebooks whose rows stand alone: an eighth of the steps that single rows would take


@dataclass(frozen=True, kw_only=True)
class Sided(Codebook):
    """A codebook whose errors in a block of rows are carried to the blocks after it.

    Raises UsageError from `check` where the codebook inside it does. Greedy passes are not defined
    for it: they would judge columns without H_O.
    """

    book: Codebook
    K: Float[Tensor, "m m"] = field(metadata=FITTED)
    sizes: tuple[int, ...] = field(metadata=FITTED)  # of the blocks of rows, in order

    @classmethod
    def of(cls, book: Codebook, H_O: Float[Tensor, "m m"], *, rows: int = ROWS) -> "Sided":
        """The codebook under H_O, which is in the basis of the rows that it will round.

        Blocks are the tiles of the codebook, or of `rows` rows where it has none. Raises
        NotPositiveDefinite.
        """
        sizes = tiles(len(H_O), book.rows if book.rows > 1 else rows)
        return cls(book=book, K=_feedback(H_O, sizes), sizes=tuple(sizes))

    @property
    def dim(self) -> int:
        return self.book.dim

    @property
    def rows(self) -> int:
        return self.book.rows

    @property
    def index_bits(self) -> int:
        return self.book.index_bits

    @property
    def first_to_last(self) -> bool:
        return self.book.first_to_last

    def check(self, m: int, n: int) -> None:
        self.book.check(m, n)

    def at(self, column: int) -> "Sided":
        return replace(self, book=self.book.at(column))

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> "Sided":
        return replace(self, book=self.book.fit(X, h), K=self.K.to(X))

    def seeded(self, rng: torch.Generator) -> "Sided":
        return replace(self, book=self.book.seeded(rng))

    def clamp(self, X: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
        return self.book.clamp(X)

    def round(self, x: Float[Tensor, "m d"], h: Float[Tensor, " d"]) -> Integer[Tensor, " m"]:
        """The codes of the blocks of rows, first to last, each with the errors of those before."""
        K, eta, codes, lo = self.K, torch.empty_like(x), [], 0
        for size in self.sizes:
            at = slice(lo, lo + size)
            z = torch.addmm(x[at], K[:lo, at].T, eta[:lo]) if lo else x[at]
            book = self.book.part(at)
            codes.append(book.round(z, h))
            eta[at] = z - book.decode(codes[-1])
            lo += size
        return torch.cat(codes)

    def decode(self, codes: Integer[Tensor, " m"]) -> Float[Tensor, "m d"]:
        return self.book.decode(codes)

    def joined(self, books: Sequence[Codebook], groups: Groups) -> Decoder:
        return self.book.joined([_inside(book) for book in books], groups)

    def split(self, codes: Integer[Tensor, "m k"]) -> Integer[Tensor, "m parts"]:
        return self.book.split(codes)


def two_sided_loss(
    E: Float[Tensor, "m n"], H_O: Float[Tensor, "m m"], H_I: Float[Tensor, "n n"]
) -> float:
    """tr(H_O E H_I E^T)."""
    E = E.double()
    return float(((E @ H_I.double()) * (H_O.double() @ E)).sum())


def _inside(book: Codebook) -> Codebook:
    assert isinstance(book, Sided)
    return book.book


def _feedback(H_O: Tensor, sizes: Sequence[int]) -> Tensor:
    """K of H_O for blocks of these sizes, which `block_ldl` of equal ones does not know."""
    C = cholesky(H_O.flip(0, 1)).flip(0, 1)  # H_O = C C^T, C upper
    for lo, hi in _spans(sizes):
        C[:lo, lo:hi] = C[:lo, lo:hi] @ torch.linalg.inv(C[lo:hi, lo:hi])
        C[lo:, lo:hi] = 0
    return running(C)


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    ends = accumulate(sizes)
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
