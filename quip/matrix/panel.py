"""Round the columns of a panel in order, each with the errors of those before it.

    x_k = X_k + sum_{j<k} eta_j K[j, k],   eta_k = x_k - w_hat_k   (base_k - w_hat_k given a base)

    X, eta, base, codes: a column of W is a contiguous row     K: any strides, read where j < k

         rows of W -->                                              k -->
    k  [ ............ ]                                        j  [ . * * * ]
    |  [ ............ ]                                        |  [ . . * * ]
    v  [ ............ ]                                        v  [ . . . * ]

`round_panel` is the operation, for any codebook; `round_panel_native` is its fast form for
uniform grids in float32 on a CPU. Both give the same codes, up to ties and float noise.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks.base import Codebook, tiles
from quip.codebooks.grid import MinMaxGrid, RmsGrid
from quip.kernels.native import library

Panel = Callable[..., tuple[Tensor, Sequence[Codebook]]]
Kept = tuple[Tensor, Tensor]
SOURCE = Path(__file__).parents[1] / "kernels" / "panel" / "cpu.cpp"


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
        book = books[i if len(books) > 1 else 0]
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
    """The fastest form for a codebook and the weights that it will round."""
    fast = (
        isinstance(book, RmsGrid if refit else RmsGrid | MinMaxGrid)
        and type(book) in (RmsGrid, MinMaxGrid)  # a subclass may round by other rules
        and not book.unbiased
        and book.step_dtype in (torch.bfloat16, torch.float32)
        and (W.dtype, W.device.type) == (torch.float32, "cpu")
    )
    return round_panel_native if fast and library(SOURCE) is not None else round_panel


class _Panel(ctypes.Structure):
    """The struct Panel of panel.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("width", "m")],
        *[(name, c_void_p) for name in ("X", "K", "base")],
        *[(name, c_int64) for name in ("K_row", "K_column")],
        *[(name, c_void_p) for name in ("eta", "codes", "step", "zero")],
        *[(name, c_int64) for name in ("step_column", "step_row", "zero_column", "zero_row")],
        ("rhos", c_void_p),
        ("candidates", c_int64),
        *[(name, c_int32) for name in ("top", "bfloat16")],
    )


def round_panel_native(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    h: Float[Tensor, " n"],
    books: Sequence[Codebook],
    *,
    base: Float[Tensor, "n m"] | None = None,
    kept: Kept | None = None,
    refit: bool = False,
) -> tuple[Integer[Tensor, "n m"], Sequence[Codebook]]:
    """`round_panel` for float32 on a CPU and the books that `panel_for` sends here.

    h is not needed: it weighs all levels of a column alike. Nor is `kept`: no other level is
    nearer than that which a column is rounded to.
    """
    n, m = X.shape
    grid = books[0]
    assert isinstance(grid, RmsGrid | MinMaxGrid)
    assert eta.is_contiguous()
    rhos = X.new_empty(0)
    if refit:
        assert isinstance(grid, RmsGrid)
        rhos = X.new_tensor(grid.rhos)
        step, zero = X.new_empty(n, 1), X.new_full((1, 1), grid.top / 2)
        books = _refitted(grid, step, zero)  # views of the steps that the kernel is to write
    else:
        step, zero = _stack(books, "step", X), _stack(books, "zero", X)
    X, base = X.contiguous(), None if base is None else base.contiguous()
    codes = torch.empty(n, m, dtype=torch.uint8)
    step_column, step_row = step.expand(n, m).stride()
    zero_column, zero_row = zero.expand(n, m).stride()
    panel = _Panel(
        width=n,
        m=m,
        X=X.data_ptr(),
        K=K.data_ptr(),
        base=None if base is None else base.data_ptr(),
        K_row=K.stride(0),
        K_column=K.stride(1),
        eta=eta.data_ptr(),
        codes=codes.data_ptr(),
        step=step.data_ptr(),
        zero=zero.data_ptr(),
        step_column=step_column,
        step_row=step_row,
        zero_column=zero_column,
        zero_row=zero_row,
        rhos=rhos.data_ptr(),
        candidates=len(rhos),
        top=grid.top,
        bfloat16=grid.step_dtype == torch.bfloat16,
    )
    native = library(SOURCE)
    assert native is not None
    native.round_panel(ctypes.byref(panel))
    return codes, books


def _stack(books: Sequence[Codebook], name: str, X: Tensor) -> Tensor:
    """Steps or zeros, [1, 1] or [1, m] of one book, [n, 1] or [n, m] of a book for each column."""
    return torch.stack([getattr(book, name) for book in books]).to(X).view(len(books), -1)


def _refitted(grid: RmsGrid, step: Tensor, zero: Tensor) -> list[RmsGrid]:
    """`replace(grid, ...)` for each step, at a tenth of its time: there is one for each column."""
    shared = grid.__dict__ | {"zero": zero.view(())}
    books = [object.__new__(RmsGrid) for _ in step]
    for book, s in zip(books, step.view(-1).unbind(), strict=True):
        book.__dict__.update(shared, step=s)
    return books
