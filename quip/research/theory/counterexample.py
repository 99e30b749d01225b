"""Where OPTQ's order and a finite grid make feedback far worse than none (QuIP, appendix C.3).

Every weight is next to 1/2. Rounded first to last, the errors add up until the target of the last
columns lies far outside the grid; the clamp then leaves an error that grows with n, where plain
rounding stays at 1/2 a column. From last to first nothing of the kind happens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from quip.jobs.report.plots import save_figure
from quip.matrix import feedback
from quip.matrix.build import build_recipe
from quip.matrix.methods import METHODS
from quip.research.theory.integers import grid, round_by, row_losses

UNCLAMPED = "unclamped"
VARIANTS: dict[str, dict[str, Any]] = {  # flags of their recipes
    "gptq": {"quant": "gptq"},
    UNCLAMPED: {"quant": "gptq"},  # on all whole numbers
    "gptq+greedy": {"quant": "gptq", "npasses": 10},
    **{name: {"quant": name} for name in METHODS if name != "gptq"},
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """n columns and m rows in the construction."""

    n: int
    rows: int
    trace_ratio: float  # tr D / tr H, first to last
    losses: dict[str, float]  # tr(E H E^T) by method

    def to_row(self) -> dict[str, int | float]:
        losses = {f"loss_{name}": loss for name, loss in self.losses.items()}
        return {"n": self.n, "rows": self.rows, "trace_ratio": self.trace_ratio, **losses}


def construction(
    n: int, rows: int, *, c: float = 0.01
) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "n n"]]:
    """W, in code units, and H = 1 1^T + I with a light last column and c added to the first.

    W_ij = 0.499 + 0.002 (j mod 2), j from zero; all rows are alike.
    """
    H = torch.ones(n, n, dtype=torch.float64) + torch.eye(n, dtype=torch.float64)
    H[-1, -1] = 1
    more = torch.full((n,), 2 * c, dtype=torch.float64)
    more[0], more[-1] = 4 * c + n * c**2, c
    H[0] += more
    H[1:, 0] += more[1:]
    row = 0.499 + 0.002 * (torch.arange(n, dtype=torch.float64) % 2)
    return row.repeat(rows, 1), H


def measure(
    sizes: Sequence[int],
    methods: Sequence[str],
    *,
    rows: int | None = 16,
    bits: int = 4,
    c: float = 0.01,
) -> Iterator[Size]:
    """tr(E H E^T) of VARIANTS on the codes 0 ... 2^bits - 1; `rows` None is as many as columns."""
    with tqdm(total=len(sizes) * len(methods), disable=None, dynamic_ncols=True) as steps:
        for n in sizes:
            W, H = construction(n, rows or n, c=c)
            losses = {}
            for name in methods:
                steps.set_description(f"n = {n}, {name}")
                book = grid(None if name == UNCLAMPED else bits)
                recipe = build_recipe(**VARIANTS[name], wbits=bits)
                W_hat = round_by(recipe, W, H, book)
                losses[name] = float(row_losses(W, W_hat, H).sum())
                steps.update()
            ratio = float(feedback.ldl(H)[1].sum() / H.trace())
            yield Size(n=n, rows=len(W), trace_ratio=ratio, losses=losses)


def plot_losses(sizes: Sequence[Size], path: Path) -> None:
    """Loss over n against n, one line a method (the paper's Figure 4), and the lowest close up."""
    from matplotlib.figure import Figure

    ordered = sorted(sizes, key=lambda size: size.n)
    low = [
        name
        for name in ordered[-1].losses
        if all(size.losses[name] < 1.5 * min(size.losses.values()) for size in ordered)
    ]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    both, close = figure.subplots(1, 2)
    for name, marker in zip(ordered[-1].losses, cycle("osv^Dx*P"), strict=False):
        n, losses = zip(*((size.n, size.losses[name] / size.n) for size in ordered), strict=True)
        [line] = both.plot(n, losses, marker=marker, markersize=5, alpha=0.7, label=name)
        if name in low:
            close.plot(n, losses, marker=marker, markersize=5, alpha=0.7, color=line.get_color())
    both.set(yscale="log", ylabel="tr(E H E$^T$) / n, in squared code units", title="All")
    close.set(title="Close up")
    for axes in (both, close):
        axes.set(xlabel="columns n", xscale="log")
        axes.set_xticks([size.n for size in ordered], [str(size.n) for size in ordered])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
    figure.suptitle(f"The finite-grid counterexample, {_rows(sizes)}")
    figure.legend(fontsize="small", loc="outside right upper")
    save_figure(figure, path)


def _rows(sizes: Sequence[Size]) -> str:
    counts = {size.rows for size in sizes}
    return f"{counts.pop()} equal rows" if len(counts) == 1 else "n equal rows"
