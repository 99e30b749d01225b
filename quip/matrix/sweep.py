"""The heart: one sweep that every method runs through.

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

from collections.abc import Iterator, Sequence, Set

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks.base import Codebook
from quip.codebooks.fitted import one_after_another
from quip.matrix.panel import panel_for

PANEL = 128  # columns that are rounded in one call
SPANS = {"cuda": 512}  # columns of a wider span, by device: of a panel's, a GPU is idle in products


def sweep(
    W: Float[Tensor, "m n"],
    K: Float[Tensor, "n n"],
    h: Float[Tensor, " n"],
    book: Codebook,
    *,
    group: int | None = None,
    block: int | None = None,
) -> tuple[Integer[Tensor, "m k"], Sequence[Codebook]]:
    """Round W column by column (book.dim at a time) under the feedback K.

    With `group`, the codebook is refitted to the running weights of each group of columns, and
    one book a group comes back; without, `book` must be fitted already and serves all. The
    last group may be short. Codes are [m, n / dim]. W sets the precision and the device.
    """
    n = W.shape[1]
    own = group == book.dim  # a book for each code: fitted while a panel is rounded, not before
    refits = group is not None and not own
    panel, fit = panel_width(book.dim, n, group), fit_width(book.dim, n, group)
    round_panel = panel_for(book, W, refit=own)
    X, h = transposed(W), h.to(W)
    eta = X  # each error takes the place of its weight, which nobody needs any more
    if X.device.type == "cuda":
        # At once: to cast each part costs more than to cast what is never read
        K = K.to(X.dtype, memory_format=torch.contiguous_format)
    codes: list[Tensor] = []
    books: list[Codebook] = [] if group else [book]
    owned: list[Sequence[Codebook]] = []
    begun = 0  # the first column that is served by the last book
    for width, lo, hi in cascade(X, K, eta, {panel, fit}, block=block):
        at = slice(lo, hi)
        if width == fit and refits:
            books.append(book.fit(X[at].T, h[at]))
            begun = lo
        if width == panel:
            used = [book] if own else [books[-1].at(lo - begun)]
            rounded, fitted = round_panel(X[at], K[at, at].to(X), eta[at], h[at], used, refit=own)
            codes.append(rounded)
            if own:
                owned.append(fitted)
    return torch.cat(codes).T, one_after_another(owned) if own else books


def cascade(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    widths: Set[int],
    *,
    block: int | None = None,
) -> Iterator[tuple[int, int, int]]:
    """Spans (width, lo, hi) of the rows of X, wider ones before the narrower ones inside them.

    When a span comes, X[lo:hi] holds sum_{j<lo} K[j, k] eta_j for each of its rows k; before the
    next one is asked for, the narrowest spans must have their eta[lo:hi] written. All of `widths`
    come, and one more that is near to `block` (None: as the device has it). X is changed in place.
    """
    block = block or span_width(X)
    unit = max((width for width in widths if width <= block), default=min(widths))
    between = max(unit, block // unit * unit)  # cuts no narrower span
    yield from _descend(X, K, eta, sorted({*widths, between}, reverse=True), 0, len(X))


def _descend(
    X: Tensor, K: Tensor, eta: Tensor, widths: Sequence[int], start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
    width, *narrower = widths
    for lo in range(start, stop, width):
        hi = min(lo + width, stop)
        if lo > start:  # half of K is never read, and never cast
            X[lo:hi].addmm_(K[start:lo, lo:hi].T.to(X), eta[start:lo])
        yield width, lo, hi
        if narrower:
            yield from _descend(X, K, eta, narrower, lo, hi)


def span_width(X: Tensor) -> int:
    """Columns that receive the feedback of all before them in one product, if none are named."""
    return SPANS.get(X.device.type, PANEL)


def panel_width(dim: int, n: int, group: int | None) -> int:
    """Columns of a panel: whole codes, never across two groups unless each code is a group."""
    width = max(dim, PANEL // dim * dim)
    return min(width, group, n) if group and group != dim else width


def fit_width(dim: int, n: int, group: int | None) -> int:
    """Columns that share a book, where a panel must end; those of a panel if any may share it."""
    return min(group, n) if group and group != dim else panel_width(dim, n, group)


def transposed(W: Float[Tensor, "m n"]) -> Float[Tensor, "n m"]:
    """A copy in which columns of W are contiguous: a plain clone would keep W's order."""
    return W.T.clone(memory_format=torch.contiguous_format)
