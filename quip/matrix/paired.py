"""H = E[x x^T] of an input, and C = E[e x^T] of each matrix it feeds, e what its output lacks.

Sums of e x^T are exact as those of x x^T are (quip.matrix.hessian): a term is rounded to multiples
of 2^-40 a_i d_j, the anchors a being those of e, as |C_ij| <= sqrt(E_ii H_jj) for E = E[e e^T].
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from quip.kernels.hessian import add_rounded
from quip.matrix.hessian import CHUNK, PANELS, Hessian, squares
from quip.matrix.target import Lack

INPUT = ""  # whose anchors are those of x; others are of what an output lacks, by name
PLAIN = "plain"  # and of x as it is, where tokens have weights
Anchors: TypeAlias = Mapping[str, Tensor]


class Cross:
    """The mean of e x^T over all tokens seen, in chunks of at most 8192 as those of a Hessian."""

    def __init__(
        self,
        m: int,
        n: int,
        *,
        rows: Float64[Tensor, " m"] | None,
        columns: Float64[Tensor, " n"] | None,
        device: torch.device | str = "cpu",
    ) -> None:
        """With the anchors of e and x; None: sums are not rounded."""
        self._sums = torch.zeros(m, n, dtype=torch.float64, device=device)
        self.squares = torch.zeros(m, dtype=torch.float64, device=device)  # sums of e_i^2
        self.largest = torch.zeros(m, dtype=torch.float64, device=device)  # of any chunk
        self.anchors, self._columns = rows, columns
        self.count = self.chunks = 0

    def update(self, e: Float[Tensor, "tokens m"], x: Float[Tensor, "tokens n"]) -> None:
        """Add tokens."""
        for own, inputs in zip(e.split(CHUNK), x.split(CHUNK), strict=True):
            P, found = own.T @ inputs.to(own.dtype), squares(own)
            if self.anchors is None or self._columns is None:
                self._sums += P
                self.squares += found
            else:
                add_rounded(self._sums, P, self.anchors, self._columns)
                unit = torch.ones_like(self.anchors[:1])
                add_rounded(self.squares[None], found[None], unit, self.anchors.square())
            self.largest = self.largest.maximum(found)
            self.count += len(own)
            self.chunks += 1

    def value(self) -> Float64[Tensor, "m n"]:
        """E[e x^T]. At least one token must have been seen."""
        return self._sums / self.count

    def reduce(self, add: Callable[[Tensor], None]) -> None:
        """Make these sums those of all processes, as `Hessian.reduce` does; but for the squares."""
        for panel in self._sums.split(max(1, -(-len(self._sums) // PANELS))):
            add(panel)  # in place: rows of a contiguous matrix
        counts = self.squares.new_tensor([self.count, self.chunks])
        add(counts)
        self.count, self.chunks = map(int, counts.tolist())

    def forget(self) -> None:
        """Let go of sums that another process has."""
        self._sums = self._sums.new_empty(0, 0)


class Paired(Hessian):
    """The moments of an input x, and what the outputs of the matrices that it feeds lack.

    `held` are those of the tokens that were held out alone; all of them count in this too. `plain`
    are the moments of x as it is, where this one and e are weighed.
    """

    def __init__(
        self,
        sizes: Mapping[str, tuple[int, int]],
        *,
        anchors: Anchors,
        holds_out: bool,
        weighs: bool = False,
        exact: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        """`sizes` [m, n] of the matrices by name, and the anchors of x and e unless not `exact`."""
        n = next(iter(sizes.values()))[1]
        columns = anchors.get(INPUT)
        super().__init__(n, anchors=columns, exact=exact, device=device)
        self.crosses = {
            name: Cross(*size, rows=anchors.get(name), columns=columns, device=device)
            for name, size in sizes.items()
        }
        self.plain = (
            Hessian(n, anchors=anchors.get(PLAIN), exact=exact, device=device) if weighs else None
        )
        self.held = (
            Paired(sizes, anchors=anchors, holds_out=False, exact=exact, device=device)
            if holds_out
            else None
        )

    def add(
        self,
        x: Float[Tensor, "windows tokens n"],
        lacking: Mapping[str, Float[Tensor, "windows tokens _m"]],
        held: Sequence[int],
        plain: Float[Tensor, "windows tokens n"] | None = None,
    ) -> None:
        """Add windows, of which these are held out."""
        self.update(x)
        if self.plain is not None and plain is not None:
            self.plain.update(plain)
        for name, e in lacking.items():
            self.crosses[name].update(e.flatten(0, -2), x.flatten(0, -2))
        if self.held and held:
            rows = [*held]
            own = {name: e[rows] for name, e in lacking.items()}
            self.held.add(x[rows], own, ())

    def sums(self) -> Iterator[tuple[str, "Hessian | Cross"]]:
        """All sums of all tokens, by what their anchors are called."""
        yield INPUT, self
        if self.plain is not None:
            yield PLAIN, self.plain
        yield from self.crosses.items()

    def lack(self) -> Lack:
        """What outputs lack on all tokens. At least one token must have been seen."""
        C = {name: cross.value() for name, cross in self.crosses.items()}
        self.finish()
        assert self._finished is not None
        return Lack(H=self._finished, C=C, count=self.count)

    def take(self) -> Float32[Tensor, "n n"]:
        found = super().take()
        self.forget()
        return found

    def reduce(self, add: Callable[[Tensor], None]) -> None:
        super().reduce(add)
        for cross in self.crosses.values():
            cross.reduce(add)
        if self.held:
            self.held.reduce(add)

    def forget(self) -> None:
        super().forget()
        for cross in self.crosses.values():
            cross.forget()
        if self.held:
            self.held.forget()
