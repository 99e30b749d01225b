"""Learned codebooks moved to where the loss is least, codes fixed (GPTVQ).

With codes fixed, W_hat = A c is linear in the centroids c, and

    tr((W - A c) H (W - A c)^T)

is a convex quadratic, of each tile of rows by itself. Conjugate gradients need no learning rate,
as the published 25 steps of Adam do; and a tile whose loss would rise once its centroids are
rounded as they are stored keeps those that it had.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from quip.codebooks.base import Codebook
from quip.codebooks.learned import Learned
from quip.kernels import centroid_matvec
from quip.kernels.groups import even, row_groups, spread

COLUMNS = 1024  # of H that are cast together
CHUNK = 2**22  # weights of the tiles that are solved together
SETTLED = 1e-4  # share of the loss that a step must be worth


@dataclass(frozen=True)
class UpdateCentroids:
    """Up to `steps` of conjugate gradients in the centroids: books move, codes stay."""

    steps: int = 30

    def __call__(
        self,
        W: Float[Tensor, "m n"],
        H: Float[Tensor, "n n"],
        codes: Integer[Tensor, "m k"],
        books: Sequence[Codebook],
        *,
        group: int | None = None,
    ) -> tuple[Integer[Tensor, "m k"], Sequence[Codebook]]:
        """The codes as they came, and books of no larger loss."""
        own = [book for book in books if isinstance(book, Learned)]
        old = torch.stack([book.centroids for book in own])  # [bands, tiles, k, d]
        cut = partial(_cut, W, H, codes, own, group or W.shape[1])
        solved = [part.solve(old[:, part.tiles], self.steps) for part in cut()]
        moved, mass = (torch.cat(x, 1) for x in zip(*solved, strict=True))
        new = [book.with_centroids(*both) for book, *both in zip(own, moved, mass, strict=True)]
        rounded = torch.stack([book.centroids for book in new])
        before, after = (
            torch.cat([part.losses(c[:, part.tiles]) for part in cut()]) for c in (old, rounded)
        )
        if new[0].scheme.entries.apart:
            return codes, [a.where(after < before, b) for a, b in zip(new, own, strict=True)]
        return codes, new if float(after.sum()) < float(before.sum()) else own


@dataclass(frozen=True)
class _Tiles:
    """Some tiles of a matrix: the problem whose unknowns are their centroids, of all bands."""

    W: Float[Tensor, "m n"]
    H: Float[Tensor, "n n"]
    codes: Integer[Tensor, "m k"]
    scales: Float[Tensor, "m runs"] | None
    band: int  # columns that share a codebook
    run: int | None  # columns that share a scale
    tiles: slice
    shape: tuple[int, int, int]  # bands, tiles, k

    def losses(self, c: Float[Tensor, "bands tiles k d"]) -> Float[Tensor, " tiles"]:
        """tr(E H E^T) of the rows of each tile, E = W - A c."""
        E = self.W - self._decode(c)
        rows = (_product(E, self.H) * E).sum(1, dtype=torch.float64)
        return rows.new_zeros(c.shape[1]).index_add_(0, self._tile_of_row, rows)

    def solve(
        self, c: Float[Tensor, "bands tiles k d"], steps: int
    ) -> tuple[Float[Tensor, "bands tiles k d"], Float[Tensor, "bands tiles k"]]:
        """c of a smaller loss, by preconditioned conjugate gradients; and the mass of centroids."""
        E = self.W - self._decode(c)
        G = _product(E, self.H)
        enough = SETTLED * (G * E).sum(dtype=torch.float64)
        residual, curvature = (
            self._gather(G),
            self._gather(self.H.diagonal()[None].to(c), squared=True),
        )
        scale = 1 / curvature.clamp_min(torch.finfo(c.dtype).tiny ** 0.5)
        scale = torch.where(curvature > 0, scale, 0)
        z = residual * scale
        p, rz = z, _dot(residual, z)
        for _ in range(steps):
            q = self._gather(_product(self._decode(p), self.H))
            pq = _dot(p, q)
            step = torch.where(pq > 0, rz / pq.clamp_min(1e-300), 0)[:, None, None].to(c)
            c, residual = c + step * p, residual - step * q
            z, last = residual * scale, rz
            rz = _dot(residual, z)
            if bool((step[:, 0, 0].double() * last).sum() < enough):
                break
            p = z + torch.where(last > 0, rz / last.clamp_min(1e-300), 0)[:, None, None].to(c) * p
        return c, curvature.mean(-1)

    def _decode(self, c: Tensor) -> Float[Tensor, "m n"]:
        return centroid_matvec.reference.decode(
            self.codes, c, self.scales, columns=self.band, block=self.run
        )

    def _gather(self, G: Float[Tensor, "m_or_1 n"], *, squared: bool = False) -> Tensor:
        """A^T G: the sum over the weights of each entry of a codebook, [bands, tiles, k, d]."""
        (m, count), n = self.codes.shape, G.shape[1]
        if self.scales is not None:
            scales = spread(self.scales, self.run, n)
            G = G * (scales.square() if squared else scales)
        by_place = G.expand(m, n).unflatten(1, (count, -1)).double().unbind(2)
        size = self.shape[0] * self.shape[1] * self.shape[2]
        sums = [torch.bincount(self._entry, g.flatten(), size) for g in by_place]
        return torch.stack(sums, 1).view(*self.shape, -1).to(self.W)

    @cached_property
    def _tile_of_row(self) -> Int64[Tensor, " m"]:
        return row_groups(len(self.codes), self.shape[1], self.codes.device)

    @cached_property
    def _entry(self) -> Int64[Tensor, " codes"]:
        """The number of the centroid of each code, among those of all bands and tiles."""
        d, (_, tiles, k) = self.W.shape[1] // self.codes.shape[1], self.shape
        numbers = centroid_matvec.reference.entries_of(
            self.codes, self._tile_of_row, tiles, k, self.band // d
        )
        return numbers.flatten()


def _cut(
    W: Tensor, H: Tensor, codes: Tensor, books: Sequence[Learned], band: int
) -> Iterator[_Tiles]:
    """The tiles of a matrix, as many at a time as have CHUNK weights."""
    tiles, k, _ = books[0].centroids.shape
    sizes = even(len(W), tiles)
    scales = [book.scales for book in books if book.scales is not None]
    whole = torch.cat(scales, 1) if scales else None
    many = max(1, CHUNK // (sizes[0] * W.shape[1]))
    for first in range(0, tiles, many):
        last = min(first + many, tiles)
        rows = slice(sum(sizes[:first]), sum(sizes[:last]))
        yield _Tiles(
            W=W[rows],
            H=H,
            codes=codes[rows],
            scales=None if whole is None else whole[rows],
            band=band,
            run=books[0].scheme.run,
            tiles=slice(first, last),
            shape=(len(books), last - first, k),
        )


def _product(E: Float[Tensor, "m n"], H: Float[Tensor, "n n"]) -> Float[Tensor, "m n"]:
    """E H in the type of E, without a copy of all H in it: that may be larger than W."""
    return torch.cat([E @ columns.to(E) for columns in H.split(COLUMNS, 1)], 1)


def _dot(x: Tensor, y: Tensor) -> Float[Tensor, " tiles"]:
    return (x.double() * y.double()).sum((0, 2, 3))
