"""Lattice codebooks of QuIP#: eight weights at once are rounded to a point of E8P.

A second stage, for 3 and 4 bits, rounds what the first one left, magnified by `ratio`:

    w_hat = scale (q_0 + q_1 / ratio),   q_0 = Q_0(w / scale),   q_1 = Q_1((w / scale - q_0) ratio)

and a code is c_0 | c_1 << 16. The scale is RMS(W) / rho. e8p.py and e81b.py are the stages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks import e8p, e81b
from quip.codebooks.base import FITTED, Codebook, Groups
from quip.errors import QuipError
from quip.kernels.bits import words
from quip.kernels.lattice_points import cpu
from quip.stored import Options

STAGES: dict[str, ModuleType] = {"e8p": e8p, "e81b": e81b}
DIM = 8
CHUNK = 2**19  # weights whose error is measured at once
UNFITTED = torch.empty(0)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A codebook of QuIP#, and the rho and ratio that it was published with."""

    stages: tuple[str, ...]
    bits: int  # per weight
    rho: float
    ratio: float | None = None

    @property
    def index_bits(self) -> int:
        return DIM * self.bits


LATTICES = {
    "E8P12": Published(stages=("e8p",), bits=2, rho=1.03),
    "E8P12RVQ3B": Published(stages=("e8p", "e81b"), bits=3, rho=0.98, ratio=2.04),
    "E8P12RVQ4B": Published(stages=("e8p", "e8p"), bits=4, rho=1.03, ratio=3.45),
}


@dataclass(frozen=True, kw_only=True)
class Lattice:
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
        rms = X.square().mean().sqrt()
        books = [self._scaled(rms / rho) for rho in self.rhos]
        return min(books, key=lambda book: book._error(X, h)) if len(books) > 1 else books[0]

    def seeded(self, rng: torch.Generator) -> "Lattice":
        return self

    def clamp(self, X: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
        """X: a lattice has no box to clamp to, and what lies outside it stays near it."""
        return X

    def round(self, x: Float[Tensor, "m d"], h: Float[Tensor, " d"]) -> Integer[Tensor, " m"]:
        """c_0 | c_1 << 16."""
        if cpu.serves(x):
            scale, ratio = float(self.scale), self.ratio or 1.0
            return cpu.nearest(x, self.stages, scale=scale, ratio=ratio)
        x = x / self.scale
        codes = e8p.nearest(x)
        if self.ratio is None:
            return codes
        left = (x - e8p.decode(codes, x.dtype)) * self.ratio
        second = STAGES[self.stages[1]].nearest(left)
        return codes | second.to(cpu.code_dtype(self.index_bits)) << 16

    def decode(self, codes: Integer[Tensor, " m"]) -> Float[Tensor, "m d"]:
        return _decode(codes[:, None], self.stages, self.ratio, self.scale[None], None)

    def joined(self, books: Sequence[Codebook], groups: Groups) -> "Lattices":
        scales = [book.scale for book in books if isinstance(book, Lattice)]
        scale = torch.stack(scales).float()  # exact: fit rounded them
        return Lattices(name=self.name, ratio=self.ratio, scale=scale, groups=groups)

    def _scaled(self, scale: Tensor) -> "Lattice":
        # No point of the lattice is 0: weights that all are get the least scale that float16 holds.
        least, tiny = 2.0**-24, torch.finfo(torch.float32).tiny
        scale = torch.where(scale > 0, scale.clamp_min(tiny), least)
        return replace(self, scale=scale.bfloat16().to(scale.dtype))

    def _error(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> float:
        """The weighted squared error of rounding X without feedback."""
        if cpu.serves(X) and X.stride(0) == 1:  # rows would be read eight numbers at a time
            known = {"scale": float(self.scale), "ratio": self.ratio or 1.0}
            spans = zip(X.split(DIM, dim=1), h.split(DIM), strict=True)
            return sum(cpu.error(x, part, self.stages, **known) for x, part in spans)
        total = 0.0
        for rows in X.split(max(1, CHUNK // X.shape[1])):
            x = rows.reshape(-1, DIM)
            error = (x - self.decode(self.round(x, h[:DIM]))).reshape(rows.shape)
            total += float(error.square_().sum(0) @ h)
        return total


@dataclass(frozen=True, kw_only=True)
class Lattices:
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
        return _decode(
            codes, _published(self.name).stages, self.ratio, self.scale, self.groups.size
        )

    def options(self) -> Options:
        group = self.groups.size and DIM * self.groups.size
        return {"name": self.name, "ratio": self.ratio, "group": group}

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    @classmethod
    def layout(
        cls, m: int, n: int, *, name: str, ratio: float | None, group: int | None
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


def _decode(
    codes: Integer[Tensor, "m k"],
    stages: tuple[str, ...],
    ratio: float | None,
    scale: Float[Tensor, " groups"],
    group: int | None,
) -> Float[Tensor, "m n"]:
    """scale (q_0 + q_1 / ratio), each scale for `group` codes of a row, in its dtype."""
    if cpu.serves(scale) and codes.device.type == "cpu":
        return cpu.decode(codes, stages, scales=scale, group=group, ratio=ratio or 1.0)
    points = e8p.decode(codes & 0xFFFF, scale.dtype)  # [m, k, 8]
    if ratio is not None:
        points += STAGES[stages[1]].decode(codes >> 16, scale.dtype).div_(ratio)
    spread = Groups(codes.shape[1], group).spread(scale[None])  # [1, k or 1]
    return points.mul_(spread.unsqueeze(-1)).flatten(1)


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
