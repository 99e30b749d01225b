"""H = E[x x^T], the second moment of a layer's inputs, which the papers call its Hessian.

Sums come out bitwise the same in any order and any grouping of their terms, so that several
processes find what one does. A term, P = X^T X of a chunk, is rounded to multiples of a quantum
2^-40 d_i d_j, where the anchors d are powers of two: P_ii < d_i^2 <= 4 P_ii for the first chunk.

    exact   while S_ii < 2^11 d_i^2, for then |S_ij| <= sqrt(S_ii S_jj) < 2^11 d_i d_j, and float64
            holds 2^13: 2048 chunks like the first at least; what grows more needs other anchors
    error   2^-41 d_i d_j a term, at most 2^-39 sqrt(P_ii P_jj) of terms like the first, of which
            products in float32 lose 2^-24 and more
    means   sums of x in multiples of 2^-33 d_i: |sum of N tokens| <= sqrt(N S_ii), exact below
            2^20 d_i: up to 2^29 tokens; a term's error is 2^-33 of sqrt(P_ii), of a chunk's tokens
"""

import copy
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from quip.kernels.hessian import QUANTUM, add_products, add_rounded

CHUNK = 8192  # tokens summed in float32 before they enter the float64 master
GROWTH = 2.0**11  # of d_i^2, up to where sums are exact
OF_MEANS = 2.0**-33  # of d_i: what sums of x are multiples of
FLOOR = 2.0**-4  # of the median P_ii: the least that an anchor stands for
NOTHING = 2.0**-800  # in place of a median where there is none: outgrown by any number
STRIP = 256  # rows of H that are made at once
PANELS = 8  # of rows in which processes add up their sums; each ends at the diagonal


@runtime_checkable
class Observed(Protocol):
    """What was seen of an input: the moments themselves, or what they are summed up from."""

    @property
    def count(self) -> int:
        """Tokens that were seen."""

    def summed(self) -> "Hessian":
        """The moments, which may be computed anew each time."""


class Hessian:
    """The means of x x^T and of x over all tokens seen, accumulated on the device of the inputs.

    Where tokens have weights s_t, of which it is handed the roots, they are weighted means; the
    weights of all tokens together have the mean 1.

    Chunks of at most 8192 tokens are summed in float32 (float64 for float64 inputs) and added
    to a float64 master: exact enough for any number of tokens, at the speed of float32, or on a
    CUDA device at that of its tensor cores for inputs of 16 bits.
    """

    def __init__(
        self,
        n: int,
        *,
        anchors: Float64[Tensor, " n"] | None = None,
        exact: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        """Without anchors, those of the first chunk; not `exact`, sums are not rounded at all."""
        self._lower = torch.zeros(n, n, dtype=torch.float64, device=device)
        self._sum = torch.zeros(n, dtype=torch.float64, device=device)
        self.largest = torch.zeros(n, dtype=torch.float64, device=device)  # P_ii of any chunk
        self.anchors, self._exact = anchors, exact
        self.complete = False  # whether these are the sums of all processes, and not of this one
        self.count = self.chunks = 0
        self._finished: Tensor | None = None

    def update(
        self, x: Float[Tensor, "*batch n"], roots: Float[Tensor, " _tokens"] | None = None
    ) -> None:
        """Add the tokens of x, whatever its leading axes; None: each with the weight 1."""
        x = x.detach().reshape(-1, len(self._lower))
        for lo in range(0, max(1, len(x)), CHUNK):
            own = None if roots is None else roots[lo : lo + CHUNK]
            chunk = weighed(x[lo : lo + CHUNK], own)
            if self.anchors is None and self._exact and len(chunk):
                self.anchors = anchors_of(squares(chunk))
            total = weighed(chunk, own).sum(0, dtype=torch.float64)
            if self.anchors is None:
                self._sum += total
            else:
                unit = torch.full_like(self.anchors[:1], OF_MEANS / QUANTUM)
                add_rounded(self._sum[None], total[None], unit, self.anchors)
            found = add_products(self._lower, chunk, self.anchors)
            self.largest = torch.maximum(self.largest, found)
            self.count += len(chunk)
            self.chunks += 1

    def value(self) -> Float[Tensor, "n n"]:
        """E[x x^T], each entry rounded to a float32, in float64 and exactly symmetric.

        Rounded, because a store (quip.data.hessians) keeps float32: what a run quantizes with and
        what its store gives back are then bitwise the same. The sums of the chunks are no more
        exact than that. At least one token must have been seen.
        """
        return self._value(torch.float64) if self._finished is None else self._finished.double()

    def finish(self) -> None:
        """Hold `value` alone, in float32: half of what the sums take, to which nothing is added."""
        if self._finished is None:
            self._finished = self._value(torch.float32)
            self._lower = self._lower.new_empty(0, 0)

    def take(self) -> Float32[Tensor, "n n"]:
        """What `value` is, in float32, which holds it exactly; nothing is held of it afterwards."""
        self.finish()
        found, self._finished = self._finished, None
        assert found is not None
        return found

    def _value(self, dtype: torch.dtype) -> Tensor:
        H = torch.empty_like(self._lower, dtype=dtype)
        for lo in range(0, len(H), STRIP):  # for large n there is no room for more than H
            rows, hi = slice(lo, lo + STRIP), lo + STRIP
            H[rows, :hi] = (self._lower[rows, :hi] / self.count).float()
            H[:lo, rows] = H[rows, :lo].T
            H[rows, rows] = H[rows, rows].tril() + H[rows, rows].tril(-1).T
        return H

    def summed(self) -> "Hessian":
        """The moments, which are at hand; other values that are seen compute them only here."""
        return self

    @property
    def squares(self) -> Float64[Tensor, " n"]:
        """The diagonal: the sum of x_i^2 of all tokens."""
        return self._lower.diagonal()

    @property
    def is_finite(self) -> bool:
        """Whether the diagonal of `value` is, as it is where every input was."""
        return bool((self.squares / self.count).float().isfinite().all())  # rounded, as `value` is

    def mean(self) -> Float[Tensor, " n"]:
        """E[x] in float64. At least one token must have been seen."""
        return self._sum / self.count

    def filled(self, pool: "Hessian") -> "Hessian":
        """(c H + (n - c) H_pool) / n of n inputs, c < n tokens; from n tokens on, H itself.

        As though the pool had given the tokens that are missing.
        """
        missing = len(self._lower) - self.count
        if missing <= 0:
            return self
        found = copy.copy(self)
        found._lower = self._lower + pool._lower * (missing / pool.count)
        found._sum = self._sum + pool._sum * (missing / pool.count)
        found.count = len(self._lower)
        return found

    def reduce(self, add: Callable[[Tensor], None]) -> None:
        """Make these sums those of all processes, whose tensors of one kind `add` adds in place."""
        n = len(self._lower)
        for lo in range(0, n, step := max(1, -(-n // PANELS))):
            at = slice(lo, lo + step), slice(0, lo + step)
            panel = self._lower[at].contiguous()
            add(panel)
            self._lower[at] = panel
        counts = self._sum.new_tensor([self.count, self.chunks])
        rest = torch.cat([self._sum, counts])
        add(rest)
        self._sum, (self.count, self.chunks) = rest[:n], map(int, rest[n:].tolist())
        self.complete = True

    def forget(self) -> None:
        """Let go of sums that another process has."""
        self._lower = self._lower.new_empty(0, 0)


def weighed(
    x: Float[Tensor, "tokens n"], roots: Float[Tensor, " tokens"] | None
) -> Float[Tensor, "tokens n"]:
    """sqrt(s_t) x_t, in float32 at least, of which s_t x_t x_t^T is made."""
    if roots is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)  # of 16 bits, each would be rounded anew
    return x.to(wide) * roots[:, None].to(wide)


def squares(x: Float[Tensor, "tokens n"]) -> Float64[Tensor, " n"]:
    """The sum of x_i^2 over the tokens."""
    return x.double().square().sum(0)


def anchors_of(squares: Float[Tensor, " n"], chunks: int = 1) -> Float64[Tensor, " n"]:
    """Anchors for so many chunks with sums of squares of at most these, d_i^2 > squares_i.

    At least a quarter of the median of those that are not 0: an input that is dead at first, as
    those behind a ReLU may be, does not outgrow that when it is found alive. Of two inputs 2^8
    below the median it costs what float32 does, and they are far below any damping.
    """
    squares = squares.double().nan_to_num(0.0, posinf=0.0)  # what is not finite stays so anyway
    squares = squares * max(1.0, 2 * chunks / GROWTH)
    median = squares.where(squares > 0, torch.nan).nanmedian().nan_to_num(NOTHING)
    _, exponents = torch.frexp(squares.maximum(FLOOR * median))  # squares < 2^exponents
    return (((exponents.long() + 1 >> 1) + 1023) << 52).view(torch.float64)  # the bits of 2^k


def outgrown(squares: Float64[Tensor, " n"], anchors: Float64[Tensor, " n"]) -> Tensor:
    """Whether sums of so large a diagonal may be inexact: a bool, on their device.

    Sums that are not finite are not: whoever asks for `is_finite` will learn of them.
    """
    return ((squares >= GROWTH * anchors.square()) & squares.isfinite()).any()


def sharing(hessians: Mapping[str, Observed]) -> list[list[str]]:
    """The names of the matrices, those with one Hessian together."""
    groups: dict[int, list[str]] = {}
    for name, hessian in hessians.items():
        groups.setdefault(id(hessian), []).append(name)
    return list(groups.values())
