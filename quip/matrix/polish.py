"""Greedy passes: what improves codes once the sweep is done."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks.base import Codebook
from quip.matrix.linalg import block_jacobi, diagonal_blocks, strictly_block_upper
from quip.matrix.panel import panel_for
from quip.matrix.sweep import Visit, _panel_width, _transposed, cascade


def greedy(
    W: Float[Tensor, "m n"],
    H: Float[Tensor, "n n"],
    codes: Integer[Tensor, "m k"],
    books: Sequence[Codebook],
    *,
    group: int | None = None,
    passes: int,
    block: int = 128,
) -> Integer[Tensor, "m k"]:
    """Coordinate descent on tr(E H E^T): each column moves to its best code, all others fixed.

    QuIP, Algorithm 4: x_k = w_k + sum_{j != k} (w_j - w_hat_j) H_jk / H_kk, new columns before
    k and old ones after. The clamp to the grid is inside the step, and a vector of several weights,
    which is rounded in the Euclidean metric, keeps its code where that is better in the metric of
    its block of H: so the loss never rises.
    """
    n, d = W.shape[1], books[0].dim
    W_T, h = _transposed(W), H.diagonal().to(W)
    J = block_jacobi(H.double(), d).to(W)
    after = strictly_block_upper(J.T, d).T
    E = torch.empty_like(W_T)
    codes_T = codes.T.clone(memory_format=torch.contiguous_format)
    for k, lo in enumerate(range(0, n, d)):
        book = books[lo // group if group else 0]
        E[lo : lo + d] = W_T[lo : lo + d] - book.decode(codes_T[k]).T
    round_panel = panel_for(books[0], W)
    metrics = diagonal_blocks(H, d).to(W)

    for _ in range(passes):
        X = W_T.clone()
        for lo in range(0, n, block):  # above the diagonal `after` is 0
            X[lo : lo + block].addmm_(after[lo:, lo : lo + block].T, E[lo:])

        def improve(lo: int, hi: int, X: Tensor = X) -> None:
            at = slice(lo, hi)
            panel_books = books[lo // group : -(-hi // group)] if group else books
            here = slice(lo // d, -(-hi // d))
            kept = (codes_T[here], metrics[here]) if d > 1 else None
            codes_T[here], _ = round_panel(
                X[at], J[at, at], E[at], h[at], panel_books, base=W_T[at], kept=kept
            )

        visits: dict[int, list[Visit]] = {_panel_width(d, n, group): [improve]}
        if group and group != d:  # panels end where a book does
            visits.setdefault(min(group, n), [])
        cascade(X, J, E, visits, block=block)
    return codes_T.T
