"""The heart: one sweep that every method runs through, and the greedy passes that polish it.

Columns go left to right; what a column's rounding leaves behind is carried to later columns:

    x_k = w_k + sum_{j<k} eta_j K[j, k].

`cascade` brings that sum to the columns in nested spans: a span first receives the feedback of
all that lies between its parent's start and its own in one matrix product, then hands over to
the finer spans inside it. Spans of 128 and 16 columns turn nearly all of the m n^2 operations
into matrix products; a span of one group is the moment at which its codebook can be refitted,
since every column in it then holds its running weights. Any choice of spans gives the same
codes. Weights are held transposed, so that a column is contiguous.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks.base import Codebook
from quip.linalg import block_jacobi

Visit = Callable[[int, int], None]
FINE = 16  # columns between single columns and a panel


def sweep(
    W: Float[Tensor, "m n"],
    K: Float[Tensor, "n n"],
    h: Float[Tensor, "n"],
    book: Codebook,
    *,
    group: int | None = None,
    block: int = 128,
) -> tuple[Integer[Tensor, "m k"], list[Codebook]]:
    """Round W column by column (book.dim at a time) under the feedback K.

    With `group`, the codebook is refitted to the running weights of each group of columns, and
    one book a group comes back; without, `book` must be fitted already and serves all. The
    last group may be short. Codes are [m, n / dim]. W sets the precision and the device.
    """
    n, d = W.shape[1], book.dim
    X, h = W.T.clone(), h.to(W)
    eta = torch.empty_like(X)
    codes: list[Tensor] = []
    books = [] if group else [book]

    def refit(lo: int, hi: int) -> None:
        books.append(book.fit(X[lo:hi].T, h[lo:hi]))

    def round_columns(lo: int, hi: int) -> None:
        x = X[lo:hi].T  # [m, d]
        codes.append(books[-1].round(x, h[lo:hi]))
        eta[lo:hi] = (x - books[-1].decode(codes[-1])).T

    visits: dict[int, list[Visit]] = {d: [round_columns]}
    if group:
        visits.setdefault(min(group, n), []).insert(0, refit)
    cascade(X, K.to(W), eta, visits, block=block)
    return torch.stack(codes, dim=1), books


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
    k and old ones after. The clamp to the grid is inside the step, so the loss never rises
    (for dim = 1; a lattice rounds in the Euclidean metric, not in that of H_kk).
    """
    d = books[0].dim
    J = block_jacobi(H.double(), d).to(W)
    position = torch.arange(len(H), device=H.device) // d
    before = position[:, None] < position[None, :]
    after = J * before.T
    book_of = [books[lo // group if group else 0] for lo in range(0, W.shape[1], d)]
    h = H.diagonal().to(W)
    E = torch.empty_like(W.T)
    codes = codes.clone()
    for lo, b in zip(range(0, W.shape[1], d), book_of, strict=True):
        E[lo : lo + d] = (W[:, lo : lo + d] - b.decode(codes[:, lo // d])).T

    for _ in range(passes):
        X = torch.addmm(W.T, after.T, E)

        def improve(lo: int, hi: int, X: Tensor = X) -> None:
            k = lo // d
            codes[:, k] = book_of[k].round(X[lo:hi].T, h[lo:hi])
            E[lo:hi] = (W[:, lo:hi] - book_of[k].decode(codes[:, k])).T

        cascade(X, J * before, E, {d: [improve]}, block=block)
    return codes


def cascade(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    visits: Mapping[int, Sequence[Visit]],
    *,
    block: int = 128,
) -> None:
    """Add sum_{j<k} K[j, k] eta_j to each row k of X, calling the visits of each span in order.

    `visits` maps a span's width to what is called with its (lo, hi) once X[lo:hi] is complete
    up to lo; the narrowest must write eta[lo:hi]. X and eta are changed in place.
    """
    narrowest, widest = min(visits), max(visits)
    panel = -(-block // widest) * widest if widest < block else block
    fine = [
        w for w in (FINE,) if w % narrowest == 0 and all(w <= v or v == narrowest for v in visits)
    ]
    widths = sorted({*visits, panel, *fine}, reverse=True)
    K_T = K.T.contiguous()

    def descend(start: int, stop: int, level: int) -> None:
        width = widths[level]
        for lo in range(start, stop, width):
            hi = min(lo + width, stop)
            if lo > start:
                X[lo:hi].addmm_(K_T[lo:hi, start:lo], eta[start:lo])
            for visit in visits.get(width, ()):
                visit(lo, hi)
            if level + 1 < len(widths):
                descend(lo, hi, level + 1)

    descend(0, len(X), 0)
