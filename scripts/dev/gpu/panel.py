"""Section `panel`: rounding a matrix with the panels of quip/kernels, and by torch.

A row is a shape, a code and a range. `ms` is the whole sweep of quip/matrix/sweep.py with its
greedy passes, books included, by spans of each width; `panel_us` is one panel of 128 columns, with
what the host needs for it. `torch_ms` is the same with the references, run once: `differ` is the
share of its codes that differ from ours, `loss_ratio` our proxy loss divided by its.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from _measure import device, emit, milliseconds, synchronize
from torch import Tensor

from quip.codebooks import Codebook, Groups, Lattice, MinMaxGrid, RmsGrid, candidate_rhos
from quip.kernels import lattice_panel, lattice_points, panel
from quip.matrix import feedback
from quip.matrix.books import CENTRES, SHARES
from quip.matrix.linalg import proxy_loss
from quip.matrix.panel import panel_for
from quip.matrix.polish import greedy
from quip.matrix.sweep import sweep

SPANS = (128, 512, 1024)  # of the sweep
SQUARE = (4096, 4096)  # where targets are, and torch is waited for
OPERATIONS = (
    *(panel.round_columns, panel.fit_and_round_columns),
    *(lattice_panel.round_blocks, lattice_panel.fit_and_round_blocks),
    *(lattice_points.nearest, lattice_points.decode, lattice_points.errors),
)


@dataclass(frozen=True)
class Way:
    """A code, and what else decides how it is rounded."""

    code: str
    range: str
    book: Codebook
    group: int | None = None
    passes: int = 0
    target_ms: float | None = None  # of SQUARE


@dataclass(frozen=True)
class Problem:
    """Weights, and the feedback of their inputs for blocks of one column or eight."""

    W: Tensor
    H: Tensor
    feedback: dict[int, tuple[Tensor, Tensor]]


def main() -> None:
    on = device()
    shapes = [SQUARE, (4096, 11008)] if on.type == "cuda" else [(8, 136)]
    emit(compile_s=compile_seconds(on))
    for shape in shapes:
        given = problem(*shape, on)
        for way in ways():
            measure(given, way)


def ways() -> Iterator[Way]:
    """All that is measured, the most important first."""
    yield Way("int 4", "column", rms(4), 1, target_ms=28.0)
    yield Way("int 4", "tensor", rms(4), target_ms=4.0)
    yield Way("E8P12", "tensor", lattice("E8P12"), target_ms=8.0)
    yield Way("E8P12", "8", lattice("E8P12"), 8, passes=2, target_ms=60.0)
    yield Way("E8P12", "8", lattice("E8P12"), 8)
    yield Way("int 4", "g128", MinMaxGrid(bits=4), 128)
    yield Way("E8P12RVQ4B", "8", lattice("E8P12RVQ4B"), 8, passes=2)
    yield Way("int 2", "column", rms(2), 1)
    yield Way("int 2", "tensor", rms(2))


def rms(bits: int) -> RmsGrid:
    return RmsGrid(bits=bits, rhos=candidate_rhos(bits), step_dtype=torch.bfloat16)


def lattice(name: str) -> Lattice:
    """As `quip run` has it."""
    rho, ratio = CENTRES[name]
    rhos = tuple(round(rho * share, 4) for share in SHARES)
    return Lattice(stages=Lattice.published(name).stages, rhos=rhos, ratio=ratio)


def compile_seconds(on: torch.device) -> float:
    """How long it takes until the first panels are rounded."""
    start, W = time.perf_counter(), torch.randn(32, 128, device=on)
    for book in (rms(4), lattice("E8P12")):
        one_panel(W, book, book.dim)
    synchronize()
    return round(time.perf_counter() - start, 2)


def problem(m: int, n: int, on: torch.device) -> Problem:
    """Gaussian weights, and correlated inputs damped by 1 %."""
    rng = torch.Generator(on).manual_seed(0)
    W = torch.randn(m, n, generator=rng, device=on)
    x = torch.randn(2 * n, n, generator=rng, device=on)
    x *= torch.linspace(0.1, 2, n, device=on)
    x += x.mean(1, keepdim=True) * n**0.5
    H = (x.T @ x / len(x)).double()
    H += 0.01 * H.diagonal().mean() * torch.eye(n, device=on)
    return Problem(W, H, {dim: feedback.ldl(H, dim) for dim in (1, 8)})


def measure(given: Problem, way: Way) -> None:
    """One row."""
    W, H, shape = given.W, given.H, tuple(given.W.shape)
    K, h = given.feedback[way.book.dim]
    book = way.book if way.group else way.book.fit(W, h.to(W))

    def ours(block: int | None = None) -> tuple[Tensor, Sequence[Codebook]]:
        codes, books = sweep(W, K, h, book, group=way.group, block=block)
        if way.passes:
            options = {"group": way.group, "passes": way.passes}
            codes = greedy(W, H, codes, books, **options, block=block)
        return codes, books

    times = {block: milliseconds(lambda block=block: ours(block), repeats=3) for block in SPANS}
    codes, W_hat = decoded(*ours(), way.group)
    row = {"loss": proxy_loss(W, W_hat, H)}
    if shape == SQUARE or W.device.type == "cpu":
        with by_torch():
            start = time.perf_counter()
            torch_codes, torch_W_hat = decoded(*ours(), way.group)
            row["torch_ms"] = round(1e3 * (time.perf_counter() - start), 1)
        row["differ"] = float((codes != torch_codes).float().mean())
        row["loss_ratio"] = row["loss"] / proxy_loss(W, torch_W_hat, H)
    emit(
        shape=shape,
        code=way.code,
        range=way.range,
        passes=way.passes,
        ms=times,
        panel_us=1e3 * one_panel(W, way.book, way.group),
        target_ms=way.target_ms if shape == SQUARE else None,
        **row,
    )


def decoded(codes: Tensor, books: Sequence[Codebook], group: int | None) -> tuple[Tensor, Tensor]:
    """(codes, W_hat), once the device has them."""
    columns = Groups(codes.shape[1], group and group // books[0].dim)
    W_hat = books[0].joined(books, columns).decode(codes)
    synchronize()
    return codes, W_hat


def one_panel(W: Tensor, book: Codebook, group: int | None) -> float:
    """Milliseconds of a panel, many of them launched together."""
    X, h = W.T[:128].contiguous(), W.new_ones(128)
    repeats = 20 if W.is_cuda else 1
    K, eta = 0.01 * torch.randn(128, 128, device=W.device), torch.empty_like(X)
    own = group == book.dim
    books = [book if own else book.fit(X.T, h)]
    round_panel = panel_for(book, W, refit=own)

    def call() -> None:
        for _ in range(repeats):
            round_panel(X, K, eta, h, books, refit=own)

    return round(milliseconds(call, repeats=3) / repeats, 4)


@contextmanager
def by_torch() -> Iterator[None]:
    """Without the fast forms of the operations."""
    forms = [operation.forms for operation in OPERATIONS]
    for operation in OPERATIONS:
        operation.forms = {}
    yield
    for operation, its in zip(OPERATIONS, forms, strict=True):
        operation.forms = its


if __name__ == "__main__":
    main()
