"""Section `panel`: rounding a matrix with the panels of quip/kernels/panel/cuda.cu, and by torch.

A row is a shape, a range and bits. `ms` is the whole sweep of quip/matrix/sweep.py, books included,
by spans of each width; `panel_us` is one panel of 128 columns. `torch_ms` is the sweep with the
reference, run once: `differ` is the share of its codes that differ from ours, `loss_ratio` our
proxy loss divided by its.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from _measure import device, emit, milliseconds, synchronize
from torch import Tensor

from quip.codebooks import RmsGrid, candidate_rhos
from quip.kernels import panel
from quip.matrix import feedback
from quip.matrix.linalg import proxy_loss
from quip.matrix.sweep import sweep

SPANS = (128, 512, 1024)  # of the sweep
TARGETS = {("column", 4096, 4096): 28.0, ("tensor", 4096, 4096): 4.0}  # ms


def main() -> None:
    on = device()
    shapes = [(4096, 4096), (4096, 11008)] if on.type == "cuda" else [(40, 256)]
    emit(compile_s=compile_seconds(on))
    for m, n in shapes:
        W, H, K, h = problem(m, n, on)
        for bits, range_ in itertools.product((4, 2, 3), ("column", "tensor")):
            measure(W, H, K, h, bits, range_)


def compile_seconds(on: torch.device) -> float:
    """How long it takes until the first panel is rounded."""
    start = time.perf_counter()
    one_panel(on, 32, "column", 4)
    synchronize()
    return round(time.perf_counter() - start, 2)


def problem(m: int, n: int, on: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, H, K, h: Gaussian weights, and correlated inputs damped by 1 %."""
    rng = torch.Generator(on).manual_seed(0)
    W = torch.randn(m, n, generator=rng, device=on)
    x = torch.randn(2 * n, n, generator=rng, device=on)
    x *= torch.linspace(0.1, 2, n, device=on)
    x += x.mean(1, keepdim=True) * n**0.5
    H = (x.T @ x / len(x)).double()
    H += 0.01 * H.diagonal().mean() * torch.eye(n, device=on)
    return W, H, *feedback.ldl(H)


def measure(W: Tensor, H: Tensor, K: Tensor, h: Tensor, bits: int, range_: str) -> None:
    """One row."""
    m, n = W.shape
    book, group = grid(bits), 1 if range_ == "column" else None
    fitted = book if group else book.fit(W, h.to(W))

    def ours(block: int = 128) -> tuple[Tensor, list]:
        return sweep(W, K, h, fitted, group=group, block=block)

    times = {block: milliseconds(lambda block=block: ours(block), repeats=3) for block in SPANS}
    codes, W_hat = decoded(*ours())
    with by_torch():
        start = time.perf_counter()
        torch_codes, torch_W_hat = decoded(*ours())
        torch_ms = 1e3 * (time.perf_counter() - start)
    emit(
        shape=[m, n],
        range=range_,
        bits=bits,
        ms=times,
        panel_us=1e3 * one_panel(W.device, m, range_, bits),
        torch_ms=round(torch_ms, 1),
        target_ms=TARGETS.get((range_, m, n)),
        differ=float((codes != torch_codes).float().mean()),
        loss=proxy_loss(W, W_hat, H),
        loss_ratio=proxy_loss(W, W_hat, H) / proxy_loss(W, torch_W_hat, H),
    )


def grid(bits: int) -> RmsGrid:
    return RmsGrid(bits=bits, rhos=candidate_rhos(bits), step_dtype=torch.bfloat16)


def decoded(codes: Tensor, books: list) -> tuple[Tensor, Tensor]:
    """(codes, W_hat), for one book or one for each column."""
    steps, zeros = (torch.stack([getattr(b, name) for b in books]) for name in ("step", "zero"))
    W_hat = steps * (codes - zeros)
    synchronize()
    return codes, W_hat


def one_panel(on: torch.device, m: int, range_: str, bits: int) -> float:
    """Milliseconds of a panel, many of them launched together."""
    X = torch.randn(128, m, device=on)
    K, eta = 0.01 * torch.randn(128, 128, device=on), torch.empty_like(X)
    step, zero = torch.full((1, 1), 0.3, device=on), torch.full((1, 1), 7.5, device=on)
    rhos, top, repeats = X.new_tensor(candidate_rhos(bits)), 2**bits - 1, 20

    def call() -> None:
        for _ in range(repeats):
            if range_ == "column":
                panel.fit_and_round_columns(X, K, eta, rhos, top=top, step_dtype=torch.bfloat16)
            else:
                panel.round_columns(X, K, eta, step, zero, top=top)

    return round(milliseconds(call, repeats=3) / repeats, 4)


@contextmanager
def by_torch() -> Iterator[None]:
    """Without the fast forms of the operation."""
    operations = panel.round_columns, panel.fit_and_round_columns
    forms = [operation.forms for operation in operations]
    for operation in operations:
        operation.forms = {}
    yield
    for operation, its in zip(operations, forms, strict=True):
        operation.forms = its


if __name__ == "__main__":
    main()
