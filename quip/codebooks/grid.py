"""Integer grids: w_hat = step (q - zero) with q = 0 ... 2^bits - 1."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

UNFITTED = torch.empty(0)
FITTED = ("step", "zero", "rng")  # what a grid owes to the matrix, not to the recipe


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A uniform grid; the subclasses say how `fit` chooses step and zero.

    Steps are rounded to `step_dtype` when they are fitted, so that what is stored is what was
    used. bfloat16 has the range of float32: a float16 step vanishes for weights below 1e-4.
    """

    bits: int
    unbiased: bool = False  # Q(t) = floor(t + u), u uniform on [0, 1), instead of u = 1/2
    step_dtype: torch.dtype = torch.bfloat16
    step: Tensor = UNFITTED  # [] or [m, 1]
    zero: Tensor = UNFITTED  # like step
    rng: torch.Generator | None = None

    dim = 1

    @property
    def index_bits(self) -> int:
        return self.bits

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def stored_bits(self) -> int:
        """Bits of the fitted steps, and of the zeros where they are not implied."""
        return self.step.numel() * self.step_dtype.itemsize * 8

    def seeded(self, rng: torch.Generator) -> Self:
        return replace(self, rng=rng) if self.unbiased else self

    def clamp(self, X: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
        return self.step * ((X / self.step + self.zero).clamp(0, self.top) - self.zero)

    def round(self, x: Float[Tensor, "m d"], h: Float[Tensor, "d"]) -> UInt8[Tensor, "m"]:
        """clamp(floor(x / step + zero + 1/2)): ties go up, everywhere."""
        t = x / self.step + self.zero
        u = torch.rand(t.shape, generator=self.rng).to(t) if self.unbiased else 0.5
        return (t + u).floor().clamp(0, self.top).to(torch.uint8).squeeze(1)

    def decode(self, codes: Int[Tensor, "m"]) -> Float[Tensor, "m 1"]:
        return self.step * (codes.unsqueeze(1) - self.zero)

    def _fitted(self, step: Tensor, zero: Tensor) -> Self:
        tiny = torch.finfo(self.step_dtype).tiny  # all-zero weights: any positive step will do
        step = step.clamp_min(tiny).to(self.step_dtype).to(step.dtype)
        return replace(self, step=step, zero=zero)


@dataclass(frozen=True, kw_only=True)
class MinMaxGrid(Grid):
    """`--qfn a`: one asymmetric grid a row, spanning its smallest and largest weight and 0."""

    @property
    def stored_bits(self) -> int:
        return super().stored_bits + self.zero.numel() * self.bits

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, "g"]) -> Self:
        high = X.amax(1, keepdim=True).clamp_min(0)
        low = X.amin(1, keepdim=True).clamp_max(0)
        fitted = self._fitted((high - low) / self.top, low)
        zero = (-low / fitted.step + 0.5).floor().clamp(0, self.top)
        return replace(fitted, zero=zero)


@dataclass(frozen=True, kw_only=True)
class RmsGrid(Grid):
    """`--qfn b`: one symmetric grid, levels s (2q / (2^bits - 1) - 1), s = rho RMS(X)."""

    rho: float = 2.4

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, "g"]) -> Self:
        s = self.rho * X.square().mean().sqrt()
        return self._fitted(2 * s / self.top, torch.full_like(s, self.top / 2))
