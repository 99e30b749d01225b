"""Learned codebooks (GPTVQ): `dim` neighbours of a row are rounded together to one of k centroids.

Groups of weights have a codebook each. When the sweep reaches the columns of a group, `fit` makes
the codebooks of all its tiles (grouping.py) from the running weights: seeds (seeds.py), improved by
EM under the weights h of errors, and rounded as they will be stored (entries.py). In a sweep
h_j is what an error in column j costs once all later columns make up for it, 1 / u_j^2 of the
paper's H^-1 = U^T U for single weights, and its like for blocks of `dim` columns; the published
code has the inverse (docs/divergences.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from quip.codebooks.base import FITTED, Codebook, Groups, Kept, Panel
from quip.codebooks.centroids import Centroids, Scheme
from quip.codebooks.scaling import joined
from quip.codebooks.seeds import SEEDS
from quip.errors import UsageError
from quip.kernels.centroids import assign, improve, round_columns
from quip.kernels.centroids.reference import batches, height, metric, vectors
from quip.kernels.groups import row_groups

UNFITTED = torch.empty(0)


@dataclass(frozen=True, kw_only=True)
class Learned(Codebook):
    """Codebooks of k = 2^(bits dim) centroids, fitted in `iterations` of EM.

    `weighted` is whether errors weigh h, in EM and in rounding, or all alike. A fitted one is that
    of a group of columns.
    """

    scheme: Scheme
    iterations: int = 100
    seeds: str = "mahalanobis"
    weighted: bool = True
    rng: torch.Generator | None = field(default=None, metadata=FITTED)
    tile_count: int | None = field(default=None, metadata=FITTED)  # of a matrix
    stored: Mapping[str, Tensor] = field(default_factory=dict, metadata=FITTED)  # of Entries
    scale_parts: Mapping[str, Tensor] = field(default_factory=dict, metadata=FITTED)
    centroids: Tensor = field(default=UNFITTED, metadata=FITTED)  # [tiles, k, dim], as stored
    scales: Tensor | None = field(default=None, metadata=FITTED)  # [m, runs]
    tile: Tensor = field(default=UNFITTED, metadata=FITTED)  # [m], of each row
    column: int = field(default=0, metadata=FITTED)  # of the group, that comes next

    rows = 1

    @property
    def dim(self) -> int:
        return self.scheme.dim

    @property
    def index_bits(self) -> int:
        return self.scheme.index_bits

    def part(self, rows: slice) -> "Learned":
        raise UsageError("vq rounds all rows of a matrix together: two-sided rounding needs others")

    def check(self, m: int, n: int) -> None:
        """Raise UsageError for a matrix whose smallest group has less vectors than centroids."""
        if n % self.dim:
            raise UsageError(
                f"its {n} inputs are no multiple of the {self.dim} weights of a centroid; say "
                "--vq_dim 1"
            )
        grouping, k = self.scheme.grouping, self.scheme.k
        vectors = grouping.fewest(m, n) // self.dim
        if vectors < k:
            rows, columns = grouping.tiles(m, n) > 1, grouping.bands(n) > 1
            larger = "--groupsize" if rows else "--columns_per_group" if columns else ""
            raise UsageError(
                f"its {m} x {n} weights make groups of {vectors:,} vectors for {k:,} centroids; "
                f"say {f'a larger {larger}, ' if larger else ''}fewer --wbits or a smaller "
                "--vq_dim, or keep the matrix out of it by --plan"
            )

    def sized(self, m: int, n: int, group: int | None) -> tuple["Learned", int | None]:
        grouping = self.scheme.grouping
        return replace(self, tile_count=grouping.tiles(m, n)), grouping.band(n)

    @property
    def first_to_last(self) -> bool:
        return self.scheme.run is not None

    def seeded(self, rng: torch.Generator) -> "Learned":
        return replace(self, rng=rng) if self.seeds == "kpp" else self

    def at(self, column: int) -> "Learned":
        return self if self.scales is None else replace(self, column=self.column + column)

    def clamp(self, X: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
        """X: centroids have no box to clamp to."""
        return X

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> "Learned":
        scaling, h = self.scheme.scaling, self._weights(h)
        parts, scales, mass, Y = {}, None, None, X.T
        if scaling is not None:
            parts = scaling.fit(X, h)
            scales = scaling.values(parts, X.dtype)
            spread = scales.repeat_interleave(scaling.size, 1)[:, : X.shape[1]].T  # [g, m]
            # An error of w / s is one of w that is s times as large.
            Y, mass = Y / spread, spread[:: self.dim].square()
        Y = Y.contiguous()
        start = self._start(Y, h, mass)
        centroids = improve(Y, start, h, iterations=self.iterations, mass=mass)
        return replace(
            self,
            scale_parts=parts,
            scales=scales,
            tile=row_groups(len(X), len(centroids), X.device),
            column=0,
            **self._kept(Y, h, mass, centroids),
        )

    def with_centroids(
        self, centroids: Float[Tensor, "tiles k d"], mass: Float[Tensor, "tiles k"]
    ) -> "Learned":
        """The codebook with these centroids, rounded as they are stored."""
        stored = self.scheme.entries.store(centroids, mass)
        rounded = self.scheme.entries.load(stored, centroids.dtype)
        return replace(self, stored=stored, centroids=rounded)

    def where(self, chosen: Bool[Tensor, " tiles"], other: "Learned") -> "Learned":
        """Take these codebooks in chosen tiles, the others elsewhere; each is stored by itself."""
        stored = {
            name: torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), x, other.stored[name])
            for name, x in self.stored.items()
        }
        centroids = torch.where(chosen[:, None, None], self.centroids, other.centroids)
        return replace(self, stored=stored, centroids=centroids)

    def round(self, x: Float[Tensor, "m d"], h: Float[Tensor, " d"]) -> Integer[Tensor, " m"]:
        Y = x if self.scales is None else x / self._scale()[:, None]
        return assign(Y.T.contiguous(), self.centroids, self._weights(h))[0]

    def decode(self, codes: Integer[Tensor, " m"]) -> Float[Tensor, "m d"]:
        points = self.centroids[self.tile, codes.long()]
        return points if self.scales is None else points * self._scale()[:, None]

    def joined(self, books: Sequence[Codebook], groups: Groups) -> Centroids:
        own = [book for book in books if isinstance(book, Learned)]
        stored = {k: torch.stack([book.stored[k] for book in own]) for k in own[0].stored}
        scaling = self.scheme.scaling
        parts = {} if scaling is None else joined(scaling, [book.scale_parts for book in own])
        return Centroids(scheme=self.scheme, stored=stored, scale_parts=parts)

    def panel(self, W: Float[Tensor, "m n"], *, refit: bool) -> Panel | None:
        one = self.scheme.grouping.band(W.shape[1]) > self.dim  # a book for more than one code
        return _round_panel if one and not refit else None

    def scales_from_here(self, codes: int) -> Float[Tensor, "codes m"] | None:
        """The scale of each of the next columns of codes, in each row."""
        if self.scales is None or self.scheme.scaling is None:
            return None
        first = torch.arange(codes, device=self.scales.device) * self.dim + self.column
        return self.scales[:, first // self.scheme.scaling.size].T.contiguous()

    def _weights(self, h: Tensor) -> Tensor:
        return h if self.weighted else torch.ones_like(h)

    def _scale(self) -> Tensor:
        assert self.scales is not None
        assert self.scheme.scaling is not None
        return self.scales[:, self.column // self.scheme.scaling.size]

    def _start(self, Y: Tensor, h: Tensor, mass: Tensor | None) -> Float[Tensor, "tiles k d"]:
        """The seeds of all tiles; those of one size are made together."""
        d, found = self.dim, []
        for groups, rows in batches(Y.shape[1], self._tiles(Y)):
            V = vectors(Y[:, rows], groups, d)
            weight = metric(h, height(groups, rows), d).expand(V.shape)
            if mass is not None:
                weight = weight * vectors(mass[:, rows], groups, 1)
            found.append(SEEDS[self.seeds](V, weight, self.scheme.k, self.rng))
        return torch.cat(found)

    def _tiles(self, Y: Tensor) -> int:
        return self.tile_count or self.scheme.grouping.tiles(Y.shape[1], len(Y))

    def _kept(self, Y: Tensor, h: Tensor, mass: Tensor | None, centroids: Tensor) -> dict[str, Any]:
        """The centroids as they are stored; of low rank, they are wanted sorted and weighed."""
        entries, weight = self.scheme.entries, centroids.new_ones(centroids.shape[:2])
        if entries.rank is not None:
            centroids = centroids.sort(1).values
            codes = assign(Y, centroids, h)
            weight = weigh(codes, h[:, None] if mass is None else h[:, None] * mass, *weight.shape)
        made = self.with_centroids(centroids, weight)
        return {"stored": made.stored, "centroids": made.centroids}


def weigh(
    codes: Integer[Tensor, "vectors m"], mass: Float[Tensor, "vectors _m"], count: int, k: int
) -> Float[Tensor, "{count} {k}"]:
    """The mass of the vectors of each centroid of each tile."""
    at = (row_groups(codes.shape[1], count, codes.device) * k + codes.long()).flatten()
    total = mass.new_zeros(count * k, dtype=torch.float64)
    total.index_add_(0, at, mass.expand(codes.shape).flatten().double())
    return total.view(count, k).to(mass)


def _round_panel(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    h: Float[Tensor, " n"],
    books: Sequence[Learned],
    *,
    base: Float[Tensor, "n m"] | None = None,
    kept: Kept | None = None,
    refit: bool = False,
) -> tuple[Integer[Tensor, "k m"], Sequence[Learned]]:
    """`round_panel` of matrix/panel.py, of columns that share one book, by kernels/centroids."""
    (book,) = books
    scales = book.scales_from_here(len(X) // book.dim)
    codes = round_columns(
        X,
        K,
        eta,
        book._weights(h),
        book.centroids,
        scales=scales,
        block=None if scales is None else book.dim,
        base=base,
        kept=kept,
    )
    return codes, books
