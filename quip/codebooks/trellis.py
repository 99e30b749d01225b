"""Trellis codes (QTIP): a tile of weights is rounded together, as a walk through 2^L states.

A state holds the last L bits of a string that ends where it begins and brings k bits a weight, and
each has its V values in a table or by a formula (trellis_codes.py). So a tile takes exactly k bits
a weight, and is rounded as well as points of as many dimensions as it has weights. Tiles of one
column keep the whole feedback of LDLQ, and have their dimension from their rows.

    w_hat = scale C[s_t],   scale = RMS(W) / (size target)

where target is the RMS that Gaussian weights should have when they meet the code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeAlias

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor

from quip.codebooks.base import FITTED, Codebook, Columns, Decoder, Groups, constants, tile_count
from quip.codebooks.fitted import side_by_side
from quip.codebooks.names import Bits
from quip.codebooks.trellis_codes import check_options, code, target_rms, weights_per_step
from quip.errors import QuipError, UsageError
from quip.kernels import trellis, trellis_matvec
from quip.kernels.bits import words
from quip.kernels.groups import spread
from quip.kernels.lattice_panel.reference import candidate_scales
from quip.kernels.trellis import ORDERS, Code, Tiling
from quip.shapes import Within
from quip.stored import Options

UNFITTED = torch.empty(0)
FileBits: TypeAlias = Annotated[int | float, Within(0.5, 8)]
States: TypeAlias = Annotated[int, Within(1, 16)]
Rows: TypeAlias = Annotated[int, Within(1, 2**20)]
Order: TypeAlias = Literal["mma"] | None  # of the steps of a tile; None: row by row


@dataclass(frozen=True, kw_only=True)
class Trellis(Codebook):
    """A code of 2^states states at `bits` bits per weight, on tiles of `rows` x `columns` weights.

    `size` is that of the weights when they meet the code, in units of the best one for Gaussian
    weights. The scale is rounded to the eight bits of mantissa of bfloat16.
    """

    code: str
    bits: Bits
    states: int
    rows: int = 256
    columns: int = 1
    size: float = 1.0
    scale: Tensor = field(default=UNFITTED, metadata=FITTED)  # []

    @property
    def dim(self) -> int:
        return self.columns

    @property
    def index_bits(self) -> int:
        return round(self.bits * self.columns)

    def check(self, m: int, n: int) -> None:
        """Raise UsageError for a matrix whose smallest tile has less bits than a state."""
        rows, row_bits = m // tile_count(m, self.rows), self.index_bits
        if rows * row_bits < self.states:
            raise UsageError(
                f"its {m} outputs make tiles of {rows} x {self.columns} weights with "
                f"{rows * row_bits} bits, and a state has {self.states}; say fewer "
                "--trellis_states or a larger --tile, or keep the matrix out of it by --plan"
            )

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> "Trellis":
        target = self.size * target_rms(self.code, self.bits, self.states)
        (scale,) = candidate_scales(X, constants((target,), X.dtype, X.device))
        return replace(self, scale=scale)

    def seeded(self, rng: torch.Generator) -> "Trellis":
        return self

    def clamp(self, X: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
        """X: what lies outside the values of the code stays near it."""
        return X

    def round(self, x: Float[Tensor, "m d"], h: Float[Tensor, " d"]) -> Integer[Tensor, " m"]:
        """The codes of the steps of each row, the first one lowest; errors weigh all alike."""
        x = (x / self.scale).float()
        return trellis.encode(x, self._code(x.device), tiles=tile_count(len(x), self.rows))

    def decode(self, codes: Integer[Tensor, " m"]) -> Float[Tensor, "m d"]:
        walks, here = self.split(codes[:, None]), self._code(codes.device)
        tiling = Tiling(tile_count(len(codes), self.rows), self.columns)
        return trellis.decode(walks, here, tiling).to(self.scale.dtype) * self.scale

    def split(self, codes: Integer[Tensor, "m k"]) -> Integer[Tensor, "m steps"]:
        return split(codes, self._code(codes.device).bits, self.index_bits)

    def joined(self, books: Sequence[Codebook], groups: Groups) -> "Trellises":
        return Trellises(
            code=self.code,
            bits=self.bits,
            states=self.states,
            rows=self.rows,
            columns=self.columns,
            group=groups.size and groups.size * self.columns,
            scale=side_by_side(books, "scale").float(),  # exact: fit rounded them
        )

    def _code(self, device: torch.device) -> Code:
        return code(self.code, self.bits, self.states, device)


def split(codes: Integer[Tensor, "m k"], bits: int, index_bits: int) -> Integer[Tensor, "m steps"]:
    """The codes of single steps, `bits` each, that codes of `index_bits` bits hold."""
    if bits == index_bits:
        return codes
    shifts = torch.arange(0, index_bits, bits, device=codes.device)
    return ((codes.unsqueeze(-1).long() >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Trellises(Decoder):
    """The trellis code of a matrix with the scale of each group of its columns."""

    code: str
    bits: Bits
    states: int
    rows: int
    columns: int
    group: int | None  # columns; None: all
    order: Order = None
    scale: Float[Tensor, " groups"]

    @property
    def dim(self) -> int:
        return weights_per_step(self.code, self.bits)

    @property
    def index_bits(self) -> int:
        return round(self.bits * self.dim)

    def decode(self, codes: Integer[Tensor, "m k"]) -> Float[Tensor, "m n"]:
        """scale C[s] in float32."""
        W = trellis.decode(codes, self._code(codes.device), self._tiling(len(codes)))
        return W.mul_(spread(self.scale[None], self.group, W.shape[1]))

    def dense(
        self, words: Int32[Tensor, "m words"], n: int, dtype: torch.dtype
    ) -> Float[Tensor, "m n"]:
        here, tiling = self._code(words.device), self._tiling(len(words))
        return trellis_matvec.decode(
            words, here, self.scale, tiling, n=n, group=self.group, dtype=dtype
        )

    def multiply(
        self, words: Int32[Tensor, "m words"], x: Float[Tensor, "*batch n"], dtype: torch.dtype
    ) -> Float[Tensor, "*batch m"]:
        here, tiling = self._code(x.device), self._tiling(len(words))
        return trellis_matvec.multiply(
            x, words, here, self.scale, tiling, group=self.group, dtype=dtype
        )

    def _code(self, device: torch.device) -> Code:
        return code(self.code, self.bits, self.states, device)

    def _tiling(self, m: int) -> Tiling:
        order = self.order and ORDERS[self.order]
        return Tiling(tile_count(m, self.rows), self.columns, order)

    def options(self) -> Options:
        names = ("code", "bits", "states", "rows", "columns", "group", "order")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    @classmethod
    def empty(
        cls,
        m: int,
        n: int,
        *,
        code: str,
        bits: FileBits,
        states: States,
        rows: Rows,
        columns: Columns,
        group: Columns | None,
        order: Order,
    ) -> dict[str, Tensor]:
        check_options(code, bits, states, rows, columns, group, order)
        V, groups = weights_per_step(code, bits), Groups(n, group)
        kV = round(bits * V)
        return {
            "codes": torch.empty(m, words(n // V, kV), dtype=torch.int32, device="meta"),
            "scale": torch.empty(groups.count, dtype=torch.float32, device="meta"),
        }

    @classmethod
    def restore(
        cls,
        tensors: Mapping[str, Tensor],
        m: int,
        n: int,
        *,
        code: str,
        bits: Bits,
        states: int,
        rows: int,
        columns: int,
        group: int | None,
        order: Order,
    ) -> "Trellises":
        check_options(code, bits, states, rows, columns, group, order)
        scale = tensors["scale"]
        if n % columns or (order and m % rows):
            raise QuipError(
                f"tiles of {rows} x {columns} do not fit {m} x {n} weights: it is damaged"
            )
        if m // tile_count(m, rows) * round(bits * columns) < states:
            raise QuipError(
                f"tiles of {rows} x {columns} of {m} outputs have less bits than a state, "
                f"{states}: the file is damaged"
            )
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise QuipError("a scale of its trellis is not a positive number: the file is damaged")
        return cls(
            code=code,
            bits=bits,
            states=states,
            rows=rows,
            columns=columns,
            group=group,
            order=order,
            scale=scale,
        )
