"""Weights in code units: the whole numbers, and rounding to them with any feedback.

The theorems round to all whole numbers; a real grid has the codes 0 ... 2^bits - 1. In code units
both have steps of 1, so that the papers' numbers can be compared without a scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from quip.codebooks import MinMaxGrid
from quip.codebooks.base import Codebook, Decoder, Groups
from quip.matrix.prepare import factored
from quip.matrix.quantize import sweep_and_polish
from quip.matrix.recipe import Recipe
from quip.matrix.sweep import sweep


@dataclass(frozen=True)
class Integers(Codebook):
    """All whole numbers: Q(t) = floor(t + 1/2), or floor(t + u) if there is an rng."""

    rng: torch.Generator | None = None

    dim = rows = 1
    index_bits = 64

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> "Integers":
        return self

    def seeded(self, rng: torch.Generator) -> "Integers":
        return replace(self, rng=rng)

    def clamp(self, X: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
        return X

    def round(self, x: Float[Tensor, "m d"], h: Float[Tensor, " d"]) -> Int64[Tensor, " m"]:
        u = 0.5 if self.rng is None else torch.rand(x.shape, generator=self.rng, dtype=x.dtype)
        return torch.floor(x + u).long().squeeze(1)

    def decode(self, codes: Int64[Tensor, " m"]) -> Float[Tensor, "m 1"]:
        return codes.double().unsqueeze(1)

    def joined(self, books: Sequence[Codebook], groups: Groups) -> Decoder:
        raise NotImplementedError("no file holds all whole numbers")


def grid(bits: int | None) -> Integers | MinMaxGrid:
    """The codes 0 ... 2^bits - 1, or all whole numbers for None."""
    if bits is None:
        return Integers()
    one = torch.ones((), dtype=torch.float64)
    return MinMaxGrid(bits=bits, step=one, zero=0 * one)


def round_weights(
    W: Float[Tensor, "m n"], K: Float[Tensor, "n n"], book: Codebook
) -> Float[Tensor, "m n"]:
    """W_hat of one sweep from the first column to the last, under the feedback K."""
    codes, _ = sweep(W, K, torch.ones(len(K), dtype=W.dtype), book)
    return codes.to(W.dtype)


def round_by(
    recipe: Recipe, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], book: Codebook
) -> Float[Tensor, "m n"]:
    """W_hat by a recipe's order, feedback and polish, on a book that is fitted already."""
    f = factored(H, recipe)
    codes, _ = sweep_and_polish(W[:, f.order], f, book, recipe)
    return codes.to(W.dtype)


def row_losses(
    W: Float[Tensor, "m n"], W_hat: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
) -> Float[Tensor, " m"]:
    """e H e^T for each row e of W_hat - W; their sum is the paper's tr(E H E^T)."""
    E = W_hat - W
    return ((E @ H) * E).sum(1)
