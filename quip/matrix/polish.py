"""What improves codes once the sweep is done: a recipe names any number of polishes, in order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks.base import Codebook, Groups
from quip.matrix.linalg import block_jacobi, diagonal_blocks
from quip.matrix.panel import panel_for
from quip.matrix.sweep import cascade, fit_width, panel_width, span_width, transposed


@runtime_checkable
class Polish(Protocol):
    """A frozen rule that takes codes and their books to better ones of the same kind.

    Law (tests/laws.py): tr(E H E^T), of the weights that the books decode, never rises.
    """

    def __call__(
        self,
        W: Float[Tensor, "m n"],
        H: Float[Tensor, "n n"],
        codes: Integer[Tensor, "m k"],
        books: Sequence[Codebook],
        *,
        group: int | None = None,
    ) -> tuple[Integer[Tensor, "m k"], Sequence[Codebook]]:
        """(codes, books) for W and H in the order of the sweep; one book for each `group` columns.

        Without a group there is one book. No argument is changed.
        """
        ...


@dataclass(frozen=True)
class Greedy:
    """Greedy passes (QuIP, Algorithm 4): codes move, books stay."""

    passes: int

    def __call__(
        self,
        W: Float[Tensor, "m n"],
        H: Float[Tensor, "n n"],
        codes: Integer[Tensor, "m k"],
        books: Sequence[Codebook],
        *,
        group: int | None = None,
    ) -> tuple[Integer[Tensor, "m k"], Sequence[Codebook]]:
        """`greedy` with these passes, and the books as they came."""
        return greedy(W, H, codes, books, group=group, passes=self.passes), books


def greedy(
    W: Float[Tensor, "m n"],
    H: Float[Tensor, "n n"],
    codes: Integer[Tensor, "m k"],
    books: Sequence[Codebook],
    *,
    group: int | None = None,
    passes: int,
    block: int | None = None,
) -> Integer[Tensor, "m k"]:
    """Coordinate descent on tr(E H E^T): each column moves to its best code, all others fixed.

    QuIP, Algorithm 4: x_k = w_k + sum_{j != k} (w_j - w_hat_j) H_jk / H_kk, new columns before
    k and old ones after. The clamp to the grid is inside the step. What is rounded together (a
    vector of several weights, in the Euclidean metric; a tile of several rows, by a search) keeps
    its codes where these are better in the metric of its block of H: so the loss never rises.
    """
    n, d, rows = W.shape[1], books[0].dim, books[0].rows
    panel, fit = panel_width(d, n, group), fit_width(d, n, group)  # panels end where a book does
    round_panel = panel_for(books[0], W)
    W_T, h = transposed(W), H.diagonal().to(W)
    J = block_jacobi(H.double(), d, W.dtype)
    code = torch.arange(n, device=W.device) // d
    metrics = diagonal_blocks(H, d).to(W)
    codes_T = codes.T.clone(memory_format=torch.contiguous_format)
    E = W_T - _decoded(codes, books, group).T
    wide = block or span_width(W_T)

    for _ in range(passes):
        X = W_T.clone()
        for lo in range(0, n, wide):
            after = J[lo:, lo : lo + wide] * (code[lo:, None] > code[lo : lo + wide])
            X[lo : lo + wide].addmm_(after.T, E[lo:])
        for width, lo, hi in cascade(X, J, E, {panel, fit}, block=block):
            if width == panel:
                at, here = slice(lo, hi), slice(lo // d, -(-hi // d))
                used = _serving(books, group, lo, hi)
                kept = (codes_T[here], metrics[here]) if d > 1 or rows > 1 else None
                codes_T[here], _ = round_panel(
                    X[at], J[at, at], E[at], h[at], used, base=W_T[at], kept=kept
                )
    return codes_T.T


def _decoded(
    codes: Integer[Tensor, "m k"], books: Sequence[Codebook], group: int | None
) -> Float[Tensor, "m n"]:
    """What the books of these groups make of the codes, in the dtype that they were fitted in."""
    d, k = books[0].dim, codes.shape[1]
    first = books[0].at(0).decode(codes[:, 0])
    if first.dtype == torch.float32:  # as in a file: in one call, not one for each column
        joined = books[0].joined(books, Groups(k, group and group // d))
        return joined.decode(books[0].split(codes))
    later = range(d, k * d, d)
    places = ((lo // group, lo % group) if group else (0, lo) for lo in later)
    rest = [books[i].at(at).decode(c) for (i, at), c in zip(places, codes.T[1:], strict=True)]
    return torch.cat([first, *rest], dim=1)


def _serving(books: Sequence[Codebook], group: int | None, lo: int, hi: int) -> Sequence[Codebook]:
    """The books of these columns: one for each group, of which there is one or all are whole."""
    if group is None:
        return [books[0].at(lo)]
    first, last = lo // group, -(-hi // group)
    return [books[first].at(lo % group)] if last - first == 1 else books[first:last]
