"""The heart: one sweep that every method runs through, and the greedy passes that polish it.

Columns go left to right; what a column's rounding leaves behind is carried to later columns:

    x_k = w_k + sum_{j<k} eta_j K[j, k].

`cascade` brings that sum to the columns in nested spans: a span first receives the feedback of
all that lies between its parent's start and its own in one matrix product, then hands over to
the finer spans inside it. So nearly all of the m n^2 operations are matrix products; the panels
of 128 columns that remain are rounded column by column in quip/matrix/panel.py. A span of one
group is the moment at which its codebook can be refitted, since every column in it then holds
its running weights. Any choice of spans gives the same codes. Weights are held transposed, so
that a column is contiguous.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks.base import Codebook
from quip.matrix.panel import panel_for

Visit = Callable[[int, int], None]
PANEL = 128  # columns that are rounded in one call


def sweep(
    W: Float[Tensor, "m n"],
    K: Float[Tensor, "n n"],
    h: Float[Tensor, " n"],
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
    X, h = _transposed(W), h.to(W)
    eta = X  # each error takes the place of its weight, which nobody needs any more
    codes: list[Tensor] = []
    books: list[Codebook] = [] if group else [book]
    own = group == d  # a book for each code: fitted while a panel is rounded, not before
    round_panel = panel_for(book, W, refit=own)

    def refit(lo: int, hi: int) -> None:
        books.append(book.fit(X[lo:hi].T, h[lo:hi]))

    def round_columns(lo: int, hi: int) -> None:
        at = slice(lo, hi)
        panel_books = [book] if own else books[-1:]
        K_panel = K[at, at].to(X)
        panel_codes, fitted = round_panel(X[at], K_panel, eta[at], h[at], panel_books, refit=own)
        codes.append(panel_codes)
        if own:
            books.extend(fitted)

    visits: dict[int, list[Visit]] = {_panel_width(d, n, group): [round_columns]}
    if group and not own:
        visits.setdefault(min(group, n), []).insert(0, refit)
    cascade(X, K, eta, visits, block=block)
    return torch.cat(codes).T, books


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
    unit = max((width for width in visits if width <= block), default=min(visits))
    panel = max(unit, block // unit * unit)  # cuts no narrower span
    _descend(X, K, eta, visits, sorted({*visits, panel}, reverse=True), 0, len(X))


def _descend(
    X: Tensor,
    K: Tensor,
    eta: Tensor,
    visits: Mapping[int, Sequence[Visit]],
    widths: Sequence[int],
    start: int,
    stop: int,
) -> None:
    """No function inside `cascade`: one that calls itself would keep K until gc finds the cycle."""
    width, *narrower = widths
    for lo in range(start, stop, width):
        hi = min(lo + width, stop)
        if lo > start:  # half of K is never read, and never cast
            X[lo:hi].addmm_(K[start:lo, lo:hi].T.to(X), eta[start:lo])
        for visit in visits.get(width, ()):
            visit(lo, hi)
        if narrower:
            _descend(X, K, eta, visits, narrower, lo, hi)


def _panel_width(dim: int, n: int, group: int | None) -> int:
    """Whole codes; never across two groups, unless each code is a group of its own."""
    width = max(dim, PANEL // dim * dim)
    return min(width, group, n) if group and group != dim else width


def _transposed(W: Tensor) -> Tensor:
    """A copy in which columns of W are contiguous: a plain clone would keep W's order."""
    return W.T.clone(memory_format=torch.contiguous_format)
