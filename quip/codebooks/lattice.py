"""Lattice codebooks of QuIP#: eight weights at once are rounded to a point of E8P.

A second stage, for 3 and 4 bits, rounds what the first one left, magnified by `ratio`:

    w_hat = scale (q_0 + q_1 / ratio),   q_0 = Q_0(w / scale),   q_1 = Q_1((w / scale - q_0) ratio)

and a code is c_0 | c_1 << 16. The scale is RMS(W) / rho. e8p.py and e81b.py are the stages, and
kernels/lattice_points finds the nearest points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Annotated, TypeAlias

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor

from quip.codebooks import e8p, e81b
from quip.codebooks.base import FITTED, Codebook, Columns, Decoder, Groups, Kept, Panel, constants
from quip.codebooks.fitted import Fitted, side_by_side
from quip.codebooks.names import DIM, LATTICES, Published
from quip.errors import QuipError
from quip.kernels import lattice_matvec, lattice_panel, lattice_points
from quip.kernels.bits import words
from quip.kernels.lattice_points import Stage
from quip.shapes import Within
from quip.stored import Options

STAGES: dict[str, ModuleType] = {"e8p": e8p, "e81b": e81b}
Ratio: TypeAlias = Annotated[float, Within(1e-6, 1e6)]  # those of any use are near 1
UNFITTED = torch.empty(0)


@dataclass(frozen=True, kw_only=True)
class Lattice(Codebook):
    """A codebook with the stages of one of LATTICES, and one scale.

    Of several rhos, `fit` takes the one with the smallest sum of h_k |x_k - w_hat_k|^2; rounding
    itself is Euclidean. Scales are rounded to the eight bits of mantissa of bfloat16, so that what
    is stored is what was used, and so that files of float16 can hold them.
    """

    stages: tuple[str, ...]
    rhos: tuple[float, ...]
    ratio: float | None = None  # None for one stage
    scale: Tensor = field(default=UNFITTED, metadata=FITTED)  # []

    dim, rows = DIM, 1

    @classmethod
    def published(cls, name: str) -> "Lattice":
        """The codebook with its published rho and ratio."""
        row = _published(name)
        return cls(stages=row.stages, rhos=(row.rho,), ratio=row.ratio)

    @property
    def name(self) -> str:
        """The name in LATTICES of the codebook with these stages."""
        return next(name for name, row in LATTICES.items() if row.stages == self.stages)

    @property
    def index_bits(self) -> int:
        return sum(STAGES[stage].INDEX_BITS for stage in self.stages)

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> "Lattice":
        rhos, stages = constants(self.rhos, X.dtype, X.device), tables(self.stages, X.device)
        return replace(self, scale=lattice_panel.fitted_scale(X, h, rhos, stages, self.ratio))

    def seeded(self, rng: torch.Generator) -> "Lattice":
        return self

    def clamp(self, X: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
        """X: a lattice has no box to clamp to, and what lies outside it stays near it."""
        return X

    def round(self, x: Float[Tensor, "m d"], h: Float[Tensor, " d"]) -> Integer[Tensor, " m"]:
        """c_0 | c_1 << 16."""
        stages = tables(self.stages, x.device)
        return lattice_points.nearest(x, stages, scale=self.scale, ratio=self.ratio)

    def decode(self, codes: Integer[Tensor, " m"]) -> Float[Tensor, "m d"]:
        stages, scales = tables(self.stages, codes.device), self.scale[None]
        return lattice_points.decode(codes[:, None], stages, scales, group=None, ratio=self.ratio)

    def panel(self, W: Float[Tensor, "m n"], *, refit: bool) -> Panel | None:
        """By kernels/lattice_panel on a GPU; a CPU rounds as fast by its points alone."""
        return _round_panel if W.device.type == "cuda" else None

    def joined(self, books: Sequence[Codebook], groups: Groups) -> "Lattices":
        scale = side_by_side(books, "scale").float()  # exact: fit rounded them
        return Lattices(name=self.name, ratio=self.ratio, scale=scale, groups=groups)


def _round_panel(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    h: Float[Tensor, " n"],
    books: Sequence[Lattice],
    *,
    base: Float[Tensor, "n m"] | None = None,
    kept: Kept | None = None,
    refit: bool = False,
) -> tuple[Integer[Tensor, "k m"], Sequence[Lattice]]:
    """`round_panel` of matrix/panel.py, with the scales as a tensor."""
    book = books[0]
    stages = tables(book.stages, X.device)
    if not refit:
        scales = side_by_side(books, "scale")
        codes = lattice_panel.round_blocks(
            X, K, eta, scales, stages, ratio=book.ratio, base=base, kept=kept
        )
        return codes, books
    assert base is kept is None
    rhos = constants(book.rhos, X.dtype, X.device)
    codes, scales = lattice_panel.fit_and_round_blocks(X, K, eta, h, rhos, stages, ratio=book.ratio)
    return codes, Fitted(book, scales, "scale")


@dataclass(frozen=True, kw_only=True)
class Lattices(Decoder):
    """The lattice of a matrix with the scale of each group of its columns."""

    name: str
    ratio: float | None
    scale: Float[Tensor, " groups"]
    groups: Groups  # of blocks of eight columns

    dim = DIM

    @property
    def index_bits(self) -> int:
        return _published(self.name).index_bits

    def decode(self, codes: Integer[Tensor, "m k"]) -> Float[Tensor, "m n"]:
        """scale (q_0 + q_1 / ratio) in float32."""
        group = self.groups.size
        return lattice_points.decode(
            codes, self._stages(codes.device), self.scale, group=group, ratio=self.ratio
        )

    def dense(
        self, words: Int32[Tensor, "m words"], n: int, dtype: torch.dtype
    ) -> Float[Tensor, "m n"]:
        stages, group = self._stages(words.device), self.groups.size
        return lattice_matvec.decode(
            words, stages, self.scale, n=n, group=group, ratio=self.ratio, dtype=dtype
        )

    def multiply(
        self, words: Int32[Tensor, "m words"], x: Float[Tensor, "*batch n"], dtype: torch.dtype
    ) -> Float[Tensor, "*batch m"]:
        return lattice_matvec.multiply(
            x,
            words,
            self._stages(x.device),
            self.scale,
            group=self.groups.size,
            ratio=self.ratio,
            dtype=dtype,
        )

    def _stages(self, device: torch.device) -> tuple[Stage, ...]:
        return tables(_published(self.name).stages, device)

    def options(self) -> Options:
        group = self.groups.size and DIM * self.groups.size
        return {"name": self.name, "ratio": self.ratio, "group": group}

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    @classmethod
    def empty(
        cls, m: int, n: int, *, name: str, ratio: Ratio | None, group: Columns | None
    ) -> dict[str, Tensor]:
        bits = _checked(name, ratio).index_bits
        groups = _groups(n, group)
        return {
            "codes": torch.empty(m, words(n // DIM, bits), dtype=torch.int32, device="meta"),
            "scale": torch.empty(groups.count, dtype=torch.float32, device="meta"),
        }

    @classmethod
    def restore(
        cls,
        tensors: Mapping[str, Tensor],
        m: int,
        n: int,
        *,
        name: str,
        ratio: float | None,
        group: int | None,
    ) -> "Lattices":
        _checked(name, ratio)
        scale = tensors["scale"]
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise QuipError("a scale of its lattice is not a positive number: the file is damaged")
        return cls(name=name, ratio=ratio, scale=scale, groups=_groups(n, group))


@cache
def tables(names: tuple[str, ...], device: torch.device) -> tuple[Stage, ...]:
    """What kernels/lattice_points is to know of each stage."""
    return tuple(STAGES[name].tables(device) for name in names)


def _published(name: str) -> Published:
    if name not in LATTICES:
        raise QuipError(f"no lattice is called {name!r}; there are {', '.join(LATTICES)}")
    return LATTICES[name]


def _checked(name: str, ratio: float | None) -> Published:
    """The codebook of these options of a file."""
    book = _published(name)
    if (ratio is None) != (len(book.stages) == 1):
        owed = "takes no ratio" if len(book.stages) == 1 else "needs a ratio"
        raise QuipError(f"{name} {owed} between its stages, and the file has {ratio}")
    if ratio is not None and not (math.isfinite(ratio) and ratio > 0):
        raise QuipError(f"a ratio of {ratio} between the stages of {name} is not a positive number")
    return book


def _groups(n: int, group: int | None) -> Groups:
    """The groups of n columns, counted in blocks of eight columns."""
    if n % DIM:
        raise QuipError(f"a lattice needs a multiple of {DIM} inputs, not {n}")
    if group is not None and (group % DIM or group < 1):
        raise QuipError(f"the groups of a lattice are multiples of {DIM} columns, not {group}")
    return Groups(n // DIM, group and group // DIM)
