"""Integer grids: w_hat = step (q - zero) with q = 0 ... 2^bits - 1."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from quip.codebooks.base import FITTED, Codebook, Groups, Kept, Panel, constants
from quip.codebooks.fitted import Fitted, side_by_side
from quip.codebooks.grids import Grids, middle
from quip.kernels.panel import fit_and_round_columns, round_columns

UNFITTED = torch.empty(0)
CHUNK = 2**20  # weights whose error is measured at once, for each of the rhos
AnyGrid = TypeVar("AnyGrid", bound="Grid")  # beartype does not know Self in a method


@dataclass(frozen=True, kw_only=True)
class Grid(Codebook):
    """A uniform grid; the subclasses say how `fit` chooses step and zero.

    Steps are rounded to `step_dtype` when they are fitted, so that what is stored is what was
    used. bfloat16 has the range of float32: a float16 step vanishes for weights below 1e-4.
    """

    bits: int
    unbiased: bool = False  # Q(t) = floor(t + u), u uniform on [0, 1), instead of u = 1/2
    step_dtype: torch.dtype = torch.bfloat16
    step: Tensor = field(default=UNFITTED, metadata=FITTED)  # [] or [m, 1]
    zero: Tensor = field(default=UNFITTED, metadata=FITTED)  # like step
    rng: torch.Generator | None = field(default=None, metadata=FITTED)

    dim = rows = 1

    @property
    def index_bits(self) -> int:
        return self.bits

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def seeded(self: AnyGrid, rng: torch.Generator) -> AnyGrid:
        return replace(self, rng=rng) if self.unbiased else self

    def part(self: AnyGrid, rows: slice) -> AnyGrid:
        own = self.step.ndim > 0
        return replace(self, step=self.step[rows], zero=self.zero[rows]) if own else self

    def snap(self, X: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The levels nearest to X, which broadcasts with the steps."""
        q = (X / self.step + self.zero + 0.5).floor().clamp(0, self.top)
        return self.step * (q - self.zero)

    def clamp(self, X: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
        return self.step * ((X / self.step + self.zero).clamp(0, self.top) - self.zero)

    def round(self, x: Float[Tensor, "m d"], h: Float[Tensor, " d"]) -> UInt8[Tensor, " m"]:
        """clamp(floor(x / step + zero + 1/2)): ties go up, everywhere."""
        t = x / self.step + self.zero
        u = torch.rand(t.shape, generator=self.rng).to(t) if self.unbiased else 0.5
        return (t + u).floor().clamp(0, self.top).to(torch.uint8).squeeze(1)

    def decode(self, codes: Integer[Tensor, " m"]) -> Float[Tensor, "m 1"]:
        return self.step * (codes.unsqueeze(1) - self.zero)

    def panel(self, W: Float[Tensor, "m n"], *, refit: bool) -> Panel | None:
        """By kernels/panel, unless it draws, or a subclass may round or fit by other rules."""
        known = type(self) is RmsGrid or (type(self) in (MinMaxGrid, SymmetricGrid) and not refit)
        return _round_panel if known and not self.unbiased else None

    def _fitted(self: AnyGrid, step: Tensor, zero: Tensor) -> AnyGrid:
        tiny = torch.finfo(self.step_dtype).tiny  # all-zero weights: any positive step will do
        step = step.clamp_min(tiny).to(self.step_dtype).to(step.dtype)
        return replace(self, step=step, zero=zero)


@dataclass(frozen=True, kw_only=True)
class MinMaxGrid(Grid):
    """`--qfn a`: one asymmetric grid a row, spanning its smallest and largest weight and 0."""

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> "MinMaxGrid":
        high = X.amax(1, keepdim=True).clamp_min(0)
        low = X.amin(1, keepdim=True).clamp_max(0)
        fitted = self._fitted((high - low) / self.top, low)
        zero = (-low / fitted.step + 0.5).floor().clamp(0, self.top)
        return replace(fitted, zero=zero)

    def joined(self, books: Sequence[Codebook], groups: Groups) -> Grids:
        step = _side_by_side(books, "step").to(self.step_dtype)
        zero = _side_by_side(books, "zero").to(torch.uint8)
        return Grids(bits=self.bits, step=step, zero=zero, groups=groups)


@dataclass(frozen=True, kw_only=True)
class SymmetricGrid(Grid):
    """`--sym`: levels -2^(bits - 1) ... 2^(bits - 1) - 1 times the step of a row.

    At a share of 1, the step is that of GPTQ, 2 max |x| / (2^bits - 1): the smallest that leaves no
    weight more than half a step from a level. Of several shares, `fit` takes for each row the one
    with the smallest sum of h_k |x_k - w_hat_k|^2.
    """

    shares: tuple[float, ...]

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> "SymmetricGrid":
        steps = X.abs().amax(1, keepdim=True) * (2 / self.top)
        steps = steps * constants(self.shares, X.dtype, X.device)  # [m, shares]
        fitted = self._fitted(steps, torch.full_like(steps[:, :1], middle(self.bits)))
        if len(self.shares) == 1:
            return fitted
        each = [replace(fitted, step=step) for step in fitted.step.split(1, dim=1)]
        errors = torch.stack([(X - grid.snap(X)).square() @ h for grid in each], dim=1)
        return replace(fitted, step=fitted.step.gather(1, errors.argmin(1, keepdim=True)))

    def joined(self, books: Sequence[Codebook], groups: Groups) -> Grids:
        step = _side_by_side(books, "step").to(self.step_dtype)
        return Grids(bits=self.bits, step=step, zero=None, groups=groups, signed=True)


@dataclass(frozen=True, kw_only=True)
class RmsGrid(Grid):
    """`--qfn b`: one symmetric grid, levels s (2q / (2^bits - 1) - 1), s = rho RMS(X).

    Of several rhos, `fit` takes the one with the smallest sum of h_k |x_k - w_hat_k|^2.
    """

    rhos: tuple[float, ...]

    def fit(
        self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"], *, chunk: int = CHUNK
    ) -> "RmsGrid":
        rhos = constants(self.rhos, X.dtype, X.device)
        steps = rhos * (2 / self.top * X.square().mean().sqrt())
        grids = self._fitted(steps, torch.full_like(steps, self.top / 2))
        step = grids.step[0]
        if len(steps) > 1:  # by `take`: an index in brackets would wait for a GPU
            step = grids.step.take(grids._errors(X, h, chunk).argmin())
        return replace(grids, step=step, zero=grids.zero[0])

    def joined(self, books: Sequence[Codebook], groups: Groups) -> Grids:
        step = _side_by_side(books, "step").to(self.step_dtype)
        return Grids(bits=self.bits, step=step, zero=None, groups=groups)

    def _errors(
        self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"], chunk: int
    ) -> Float[Tensor, " rhos"]:
        """The weighted squared error of rounding X without feedback, for each step."""
        total = torch.zeros_like(self.step)
        for x in X.unsqueeze(-1).split(max(1, chunk // X.shape[1])):  # [rows, g, 1]
            total += ((x - self.snap(x)).square().sum(0) * h[:, None]).sum(0)
        return total


def _round_panel(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    h: Float[Tensor, " n"],
    books: Sequence[Grid],
    *,
    base: Float[Tensor, "n m"] | None = None,
    kept: Kept | None = None,
    refit: bool = False,
) -> tuple[UInt8[Tensor, "n m"], Sequence[Grid]]:
    """`round_panel` of matrix/panel.py, with the grids as tensors.

    h is not needed: it weighs all levels of a column alike. Nor is `kept`: no other level is
    nearer than that which a column is rounded to.
    """
    grid = books[0]
    if not refit:
        step, zero = _stacked(books, "step", X), _stacked(books, "zero", X)
        return round_columns(X, K, eta, step, zero, top=grid.top, base=base), books
    assert isinstance(grid, RmsGrid)
    rhos, dtype = constants(grid.rhos, X.dtype, X.device), grid.step_dtype
    codes, steps = fit_and_round_columns(X, K, eta, rhos, top=grid.top, step_dtype=dtype, base=base)
    return codes, Fitted(replace(grid, zero=steps.new_full((), grid.top / 2)), steps, "step")


def _stacked(books: Sequence[Grid], name: str, X: Tensor) -> Float[Tensor, "books_or_1 m_or_1"]:
    """Steps or zeros: a row of one book for all columns, or of a book for each of them."""
    return side_by_side(books, name).to(X).reshape(len(books), -1)


def _side_by_side(books: Sequence[Codebook], name: str) -> Float[Tensor, "r groups"]:
    if getattr(books[0], name).ndim == 0:
        return side_by_side(books, name)[None]
    return torch.cat([getattr(book, name) for book in books], dim=1)


def candidate_rhos(bits: int) -> tuple[float, ...]:
    """Ten rhos from 0.7 to 1.7 times what is best, nearly, for Gaussian weights: (bits + 1) / 2."""
    return tuple(round(0.35 * (bits + 1) * (1.7 / 0.7) ** (i / 9), 4) for i in range(10))
