"""The learned codebooks of a whole matrix, as a file holds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor

from quip.codebooks.base import Decoder
from quip.codebooks.entries import Entries
from quip.codebooks.grouping import Grouping
from quip.codebooks.scaling import LogScales, Scaling, UnitScales
from quip.errors import QuipError
from quip.kernels import centroid_matvec
from quip.kernels.bits import words
from quip.shapes import Within
from quip.stored import Options

LARGEST = 16  # bits of a code
MOST = 2**48  # entries of all codebooks of a matrix; those of use are fewer than its weights
Count: TypeAlias = Annotated[int, Within(1, 10**12)]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What is alike for all matrices of one recipe: of codes, groups, entries and scales."""

    dim: Literal[1, 2, 4]
    bits: int  # per weight
    weights: int | None  # of a group; None: all rows
    columns: int | None  # near to those of a group; None: all columns
    entry_bits: Literal[16, 8, 4] = 8
    shared: bool = False  # the scale of entries, by all codebooks of a group of columns
    rank: int | None = None
    run: int | None = None  # weights that share a scale

    def __post_init__(self) -> None:
        if self.index_bits > LARGEST:
            raise QuipError(
                f"codes of {self.bits} x {self.dim} bits name more than 2^{LARGEST} centroids"
            )
        if self.run is not None and self.run % self.dim:
            raise QuipError(f"runs of {self.run} weights cut vectors of {self.dim}")
        if self.rank is not None and (self.dim, self.entry_bits) != (1, 16):
            raise QuipError("codebooks of low rank have one dimension and entries of 16 bits")
        if self.rank is not None and self.rank > self.k:
            raise QuipError(f"a rank of {self.rank} is above that of {self.k} centroids")
        if self.entry_bits == 4 and self.run is None:
            raise QuipError("entries of 4 bits need the units of runs of weights")

    @property
    def index_bits(self) -> int:
        return self.bits * self.dim

    @property
    def k(self) -> int:
        return 2**self.index_bits

    @property
    def grouping(self) -> Grouping:
        return Grouping(self.weights, self.columns, self.run or self.dim)

    @property
    def entries(self) -> Entries:
        return Entries(self.entry_bits, self.dim, self.k, self.shared, self.rank)

    @property
    def scaling(self) -> Scaling | None:
        if self.run is None:
            return None
        return UnitScales(self.run) if self.entry_bits == 4 else LogScales(self.run)


@dataclass(frozen=True, kw_only=True)
class Centroids(Decoder):
    """The codebooks of all groups of a matrix, and the scales of runs of its rows."""

    scheme: Scheme
    stored: Mapping[str, Tensor]  # of Entries
    scale_parts: Mapping[str, Tensor]  # of Scaling

    @property
    def dim(self) -> int:
        return self.scheme.dim

    @property
    def index_bits(self) -> int:
        return self.scheme.index_bits

    def decode(self, codes: Integer[Tensor, "m k"]) -> Float[Tensor, "m n"]:
        """s c in float32, c the centroid of each code, and s the scale of its run."""
        return self.decode_with(codes, self.learnable())

    def decode_with(
        self, codes: Integer[Tensor, "m k"], values: Mapping[str, Tensor]
    ) -> Float[Tensor, "m n"]:
        band = self.scheme.grouping.band(codes.shape[1] * self.dim)
        scales = self._scales({**self.scale_parts, **values})
        return centroid_matvec.reference.decode(
            codes, values["centroids"], scales, columns=band, block=self.scheme.run
        )

    def multiply(
        self, words: Int32[Tensor, "m words"], x: Float[Tensor, "*batch n"], dtype: torch.dtype
    ) -> Float[Tensor, "*batch m"]:
        return centroid_matvec.multiply(
            x,
            words,
            self._centroids(),
            self._scales(self.scale_parts),
            columns=self.scheme.grouping.band(x.shape[-1]),
            block=self.scheme.run,
            bits=self.index_bits,
            dtype=dtype,
        )

    def learnable(self) -> dict[str, Tensor]:
        """The centroids [bands, tiles, k, dim], and what scales of runs are made of."""
        moves = self._moves(self.scale_parts)
        return {"centroids": self._centroids(), **{name: x.float() for name, x in moves.items()}}

    def learned(self, values: Mapping[str, Tensor]) -> "Centroids":
        """Centroids and scales near to these, rounded as a file holds them."""
        centroids = values["centroids"].detach()
        stored = self.scheme.entries.store(centroids, torch.ones_like(centroids[..., 0]))
        moved = self._moves({**self.scale_parts, **values})
        parts = {name: x.detach().to(self.scale_parts[name].dtype) for name, x in moved.items()}
        scale_parts = {**self.scale_parts, **parts}
        return Centroids(scheme=self.scheme, stored=stored, scale_parts=scale_parts)

    def options(self) -> Options:
        s = self.scheme
        return {
            "dim": s.dim,
            "bits": s.bits,
            "weights": s.weights,
            "columns": s.columns,
            "entry_bits": s.entry_bits,
            "shared": s.shared,
            "rank": s.rank,
            "run": s.run,
        }

    def tensors(self) -> dict[str, Tensor]:
        scaling = self.scheme.scaling
        return {**self.stored, **({} if scaling is None else scaling.store(self.scale_parts))}

    @classmethod
    def empty(
        cls,
        m: int,
        n: int,
        *,
        dim: Literal[1, 2, 4],
        bits: Annotated[int, Within(1, LARGEST)],
        weights: Count | None,
        columns: Count | None,
        entry_bits: Literal[16, 8, 4],
        shared: bool,
        rank: Annotated[int, Within(1, 2**LARGEST)] | None,
        run: Annotated[int, Within(1, 10**9)] | None,
    ) -> dict[str, Tensor]:
        scheme = Scheme(
            dim=dim,
            bits=bits,
            weights=weights,
            columns=columns,
            entry_bits=entry_bits,
            shared=shared,
            rank=rank,
            run=run,
        )
        if n % dim:
            raise QuipError(f"codes of {dim} weights need a multiple of {dim} inputs, not {n}")
        grouping, scaling = scheme.grouping, scheme.scaling
        if grouping.bands(n) * grouping.tiles(m, n) * scheme.k * dim > MOST:
            raise QuipError(
                f"groups of {weights} weights have {scheme.k} centroids each, which no model has: "
                "its config.json is damaged; download or save it again"
            )
        codes = torch.empty(m, words(n // dim, scheme.index_bits), dtype=torch.int32, device="meta")
        return {
            "codes": codes,
            **scheme.entries.empty(grouping.bands(n), grouping.tiles(m, n)),
            **({} if scaling is None else scaling.empty(m, n)),
        }

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], m: int, n: int, **options: object
    ) -> "Centroids":
        scheme = Scheme(**options)  # type: ignore[arg-type]  # as `empty` declares them
        layout = scheme.entries.empty(1, 1)
        stored = {name: tensors[name] for name in layout}
        if not bool(scheme.entries.load(stored, torch.float32).isfinite().all()):
            raise QuipError("a number of its codebooks is not finite: the file is damaged")
        if "centroid_scale" in stored and not bool((stored["centroid_scale"] > 0).all()):
            raise QuipError("a scale of its codebooks is not positive: the file is damaged")
        scaling = scheme.scaling
        parts = {} if scaling is None else scaling.restore(tensors, n)
        return cls(scheme=scheme, stored=stored, scale_parts=parts)

    def _centroids(self) -> Float[Tensor, "bands tiles k d"]:
        return self.scheme.entries.load(self.stored, torch.float32)

    def _scales(self, parts: Mapping[str, Tensor]) -> Float[Tensor, "m runs"] | None:
        scaling = self.scheme.scaling
        return None if scaling is None else scaling.values(parts, torch.float32)

    def _moves(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What tuning may move of these parts of scales."""
        scaling = self.scheme.scaling
        return {} if scaling is None else {scaling.moves: parts[scaling.moves]}
