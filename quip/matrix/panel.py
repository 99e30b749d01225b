"""Round the columns of a panel in order, each with the errors of those before it.

    x_k = X_k + sum_{j<k} eta_j K[j, k],   eta_k = x_k - w_hat_k   (base_k - w_hat_k given a base)

    X, eta, base, codes: a column of W is a contiguous row     K: any strides, read where j < k

         rows of W -->                                              k -->
    k  [ ............ ]                                        j  [ . * * * ]
    |  [ ............ ]                                        |  [ . . * * ]
    v  [ ............ ]                                        v  [ . . . * ]

`round_panel` is that for any codebook. A codebook may offer a faster way, which takes the loop
to kernels/panel; both give the same codes, up to ties and float noise.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks.base import Codebook, Kept, Panel, tiles


def round_panel(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    h: Float[Tensor, " n"],
    books: Sequence[Codebook],
    *,
    base: Float[Tensor, "n m"] | None = None,
    kept: Kept | None = None,
    refit: bool = False,
) -> tuple[Integer[Tensor, "k m"], Sequence[Codebook]]:
    """(codes, their books) of the columns X, book.dim at a time; their errors go into eta.

    `books` is one for the whole panel or one for each code. With `refit`, the one is fitted to
    the running weights of each code before they are rounded, and the fitted ones come back.
    `kept` = (codes [k, m], metrics [k, d, d]) are codes that stay wherever the new one is no
    nearer to x in the metric, whose errors e are as large as e^T metric e; of a tile of rows all
    stay or none.
    """
    d = books[0].dim
    codes, used = [], []
    for i, lo in enumerate(range(0, len(X), d)):
        span = slice(lo, lo + d)
        x = torch.addmm(X[span], K[:lo, span].T, eta[:lo]).T if lo else X[span].T  # [m, d]
        book = books[i] if len(books) > 1 else books[0].at(lo)
        used.append(book.fit(x, h[span]) if refit else book)
        code = used[-1].round(x, h[span])
        codes.append(code if kept is None else _nearer(code, kept[0][i], x, used[-1], kept[1][i]))
        eta[span] = ((x if base is None else base[span].T) - used[-1].decode(codes[-1])).T
    return torch.stack(codes), used if refit else books


def _nearer(new: Tensor, old: Tensor, x: Tensor, book: Codebook, metric: Tensor) -> Tensor:
    """The code with the smaller error for each row of x; the old one where both are equal.

    Rows of one tile of the codebook are judged by their sum.
    """
    e_new, e_old = x - book.decode(new), x - book.decode(old)
    gain = ((e_old @ metric) * e_old).sum(1) - ((e_new @ metric) * e_new).sum(1)
    if book.rows > 1:  # a tile moves as a whole or stays
        sizes = tiles(len(gain), book.rows)
        sums = torch.stack([part.sum() for part in gain.split(sizes)])
        gain = sums.repeat_interleave(torch.tensor(sizes, device=gain.device))
    return torch.where(gain > 0, new, old.to(new.dtype))


def panel_for(book: Codebook, W: Float[Tensor, "m n"], *, refit: bool = False) -> Panel:
    """What the codebook offers for the weights that it will round; else `round_panel`."""
    return book.panel(W, refit=refit) or round_panel
