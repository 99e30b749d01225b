"""OPTQ and LDLQ are one algorithm (QuIP, Theorem 6), shown by running both.

OPTQ works on the inverse of H, LDLQ on a factor of H itself. In exact arithmetic every target that
they round is the same; in floating point the targets differ by rounding noise, and a code could
differ only where a target is nearer than that to a tie.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from quip.codebooks.base import Codebook
from quip.jobs.report.plots import save_figure
from quip.matrix.build import build_recipe
from quip.matrix.linalg import block_ldl
from quip.matrix.seeds import rng_for
from quip.research.theory.integers import grid, round_by, row_losses
from quip.research.theory.problems import correlated_hessian, uniform_weights

OPTQ = build_recipe(quant="gptq", wbits=4)  # of which order, feedback and polish are used
DECADES = torch.linspace(-18, 1, 191, dtype=torch.float64)  # log10, the edges of bins


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both algorithms on one W and H. Codes are whole numbers, targets what is rounded to them."""

    n: int
    rows: int
    bits: int | None  # None: all whole numbers
    differing_codes: int
    largest_difference: float  # of targets
    nearest_tie: float  # the least distance of a target from where its code would change
    loss_optq: float  # tr(E H E^T)
    loss_ldlq: float
    seconds_optq: float
    seconds_ldlq: float
    difference_counts: Sequence[float] = field(repr=False)  # weights in each of DECADES
    tie_counts: Sequence[float] = field(repr=False)

    @property
    def grid(self) -> str:
        return "whole numbers" if self.bits is None else f"{self.bits} bits"

    def to_row(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if not key.endswith("counts")}


def optq(
    W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], book: Codebook
) -> tuple[Float[Tensor, "m n"], Float[Tensor, "m n"]]:
    """(W_hat, targets) of OPTQ's Algorithm 1, a column at a time: with H^-1 = T^T T, T upper,

    e = (x_k - Q(x_k)) / T_kk, then x_j <- x_j - e T_kj for every j > k.
    """
    X, W_hat = W.clone(), torch.zeros_like(W)
    ones = torch.ones(1, dtype=W.dtype)
    T = torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True).to(W)
    for k in range(W.shape[1]):
        codes = book.round(X[:, k : k + 1], ones)
        W_hat[:, k] = book.decode(codes).squeeze(1)
        e = (X[:, k] - W_hat[:, k]) / T[k, k]
        X[:, k + 1 :] -= torch.outer(e, T[k, k + 1 :])
    return W_hat, X


def ldlq_targets(
    W: Float[Tensor, "m n"], W_hat: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
) -> Float[Tensor, "m n"]:
    """t_k = W_k + (W - W_hat) F_k with LDLQ's F, first column to last."""
    F, _ = block_ldl(H)
    return W + (W - W_hat) @ F.to(W)


def compare(
    n: int, rows: int, bits: int | None, *, seed: int, dtype: torch.dtype = torch.float64
) -> Comparison:
    """Both on W uniform on [0, 2^bits - 1] (on [0, 1] for all whole numbers) and a random H.

    LDLQ is `--quant gptq`, in the sweep that quantizes models.
    """
    rng = rng_for(seed, f"equivalence {n}")
    H = correlated_hessian(n, rng)
    W = uniform_weights(rows, n, rng).mul(1 if bits is None else 2**bits - 1).to(dtype)
    book = grid(bits)
    (ours, targets), seconds_optq = _timed(lambda: optq(W, H, book))
    theirs, seconds_ldlq = _timed(lambda: round_by(OPTQ, W, H, book))
    differences = (targets - ldlq_targets(W, theirs, H)).abs()
    ties = _tie_distances(targets, bits)
    return Comparison(
        n=n,
        rows=rows,
        bits=bits,
        differing_codes=int((ours != theirs).sum()),
        largest_difference=float(differences.max()),
        nearest_tie=float(ties.min()),
        loss_optq=float(row_losses(W.double(), ours.double(), H).sum()),
        loss_ldlq=float(row_losses(W.double(), theirs.double(), H).sum()),
        seconds_optq=seconds_optq,
        seconds_ldlq=seconds_ldlq,
        difference_counts=_counts(differences),
        tie_counts=_counts(ties),
    )


def compare_all(
    sizes: Sequence[int],
    grids: Sequence[int | None],
    *,
    rows: int | None,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Comparison]:
    """Every size with every grid; `rows` None is as many as columns."""
    pairs = [(n, bits) for n in sizes for bits in grids]
    with tqdm(pairs, disable=None, dynamic_ncols=True) as steps:
        for n, bits in steps:
            steps.set_description(f"n = {n}")
            yield compare(n, rows or n, bits, seed=seed, dtype=dtype)


def plot_differences(found: Sequence[Comparison], path: Path) -> None:
    """Draw, for the largest comparison, how far apart the targets are and how far from a tie."""
    from matplotlib.figure import Figure

    largest = max(found, key=lambda c: c.n * c.rows)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, counts in (
        ("between the targets of OPTQ and LDLQ", largest.difference_counts),
        ("from a target to the nearest tie", largest.tie_counts),
    ):
        axes.stairs(counts, DECADES.numpy(), fill=True, alpha=0.6, label=label)
    axes.set(
        xlabel="log$_{10}$ of the distance in code units (equal: at the left edge)",
        ylabel="weights",
        yscale="log",
        title=f"{largest.rows} x {largest.n} weights, {largest.grid}: "
        f"{largest.differing_codes} codes differ",
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small", loc="upper left")
    save_figure(figure, path)


def plot_sizes(found: Sequence[Comparison], path: Path) -> None:
    """Against n: the largest difference of targets beside the nearest tie, and seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    grids = dict.fromkeys(c.grid for c in found)
    for grid_name, style in zip(grids, cycle(("-", "--", ":", "-.")), strict=False):
        line = sorted((c for c in found if c.grid == grid_name), key=lambda c: c.n)
        n = [c.n for c in line]
        for axes, name, colour, words in (
            (left, "nearest_tie", "tab:orange", "nearest tie"),
            (left, "largest_difference", "tab:blue", "largest difference"),
            (right, "seconds_optq", "tab:blue", "OPTQ, column by column"),
            (right, "seconds_ldlq", "tab:orange", "LDLQ, in spans"),
        ):
            values = [getattr(c, name) for c in line]
            label = f"{words}, {grid_name}"
            axes.plot(n, values, style, marker="o", markersize=4, color=colour, label=label)
    left.set(ylabel="distance in code units", title="Targets")
    right.set(ylabel="seconds", title="Time")
    for axes in (left, right):
        axes.set(xlabel="columns n", xscale="log", yscale="log")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="x-small")
    save_figure(figure, path)


def _counts(distances: Float[Tensor, "m n"]) -> list[float]:
    logs = distances.double().log10().clamp(float(DECADES[0]), float(DECADES[-1]))
    return torch.histogram(logs.flatten().cpu(), DECADES).hist.tolist()


def _tie_distances(targets: Float[Tensor, "m n"], bits: int | None) -> Float[Tensor, "m n"]:
    """How far each target is from the nearest k + 1/2 that separates two codes."""
    between = targets.floor() + 0.5
    if bits is not None:
        between = between.clamp(0.5, 2**bits - 1.5)
    return (targets - between).abs()


def _timed(compute: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return compute(), time.perf_counter() - start
