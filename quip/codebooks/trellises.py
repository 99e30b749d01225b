"""The trellis codes of a matrix as a file holds them: a code for each step, scales, words."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal, TypeAlias

import torch
from jaxtyping import Float, Float16, Int16, Int32, Integer
from torch import Tensor
from torch.nn.functional import embedding

from quip.codebooks.base import Columns, Decoder, Groups, tile_count
from quip.codebooks.names import Bits
from quip.codebooks.trellis_codes import check_options, code, weights_per_step
from quip.errors import QuipError
from quip.kernels import trellis, trellis_matvec
from quip.kernels.bits import words
from quip.kernels.groups import spread
from quip.kernels.trellis import ORDERS, Code, Tiling
from quip.shapes import Within
from quip.stored import Options

FileBits: TypeAlias = Annotated[int | float, Within(0.5, 8)]
States: TypeAlias = Annotated[int, Within(1, 16)]
Rows: TypeAlias = Annotated[int, Within(1, 2**20)]
Order: TypeAlias = Literal["mma"] | None  # of the steps of a tile; None: row by row


@dataclass(frozen=True, kw_only=True)
class Trellises(Decoder):
    """The trellis code of a matrix with the scale of each group of its columns.

    What tuning may move are the scales, and a table that a matrix has for itself.
    """

    code: str
    bits: Bits
    states: int
    rows: int
    columns: int
    group: int | None  # columns; None: all
    order: Order = None
    scale: Float[Tensor, " groups"]
    table: Float16[Tensor, "states V"] | None = None  # None: that of the code

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

    def prepared(self, codes: Integer[Tensor, "m k"]) -> Int16[Tensor, "m k"]:
        """The states of all steps, modulo 2^16."""
        count, V = 2**self.states, self.dim
        numbers = torch.arange(count, device=codes.device).float()[:, None].repeat(1, V)
        steps = Code("table", self.index_bits, numbers)  # whose values are the states themselves
        found = trellis.decode(codes, steps, self._tiling(len(codes)))[:, ::V]
        return found.int().to(torch.int16)

    def learnable(self) -> dict[str, Tensor]:
        own = {} if self.table is None else {"table": self.table.float()}
        return {"scale": self.scale, **own}

    def decode_with(
        self, codes: Integer[Tensor, "m k"], values: Mapping[str, Tensor]
    ) -> Float[Tensor, "m n"]:
        states = codes.int() & (2**self.states - 1)
        table = values.get("table", self._code(codes.device).table)
        W = embedding(states, table).flatten(1)
        return W * spread(values["scale"][None], self.group, W.shape[1])

    def learned(self, values: Mapping[str, Tensor]) -> "Trellises":
        """Scales and table near to these, in the types of a file; scales as `fit` rounds them."""
        scale = values["scale"].detach().clamp_min(torch.finfo(torch.bfloat16).tiny)
        table = values["table"].detach().half() if "table" in values else None
        return replace(self, scale=scale.bfloat16().float(), table=table)

    def _code(self, device: torch.device) -> Code:
        return self._own or code(self.code, self.bits, self.states, device)

    @cached_property
    def _own(self) -> Code | None:
        """The code of a matrix that has a table for itself."""
        return None if self.table is None else Code("table", self.index_bits, self.table.float())

    def _tiling(self, m: int) -> Tiling:
        order = self.order and ORDERS[self.order]
        return Tiling(tile_count(m, self.rows), self.columns, order)

    def options(self) -> Options:
        names = ("code", "bits", "states", "rows", "columns", "group", "order")
        return {**{name: getattr(self, name) for name in names}, "own": self.table is not None}

    def tensors(self) -> dict[str, Tensor]:
        own = {} if self.table is None else {"table": self.table}
        return {"scale": self.scale, **own}

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
        own: bool,
    ) -> dict[str, Tensor]:
        check_options(code, bits, states, rows, columns, group, order)
        V, groups = weights_per_step(code, bits), Groups(n, group)
        kV = round(bits * V)
        layout = {
            "codes": torch.empty(m, words(n // V, kV), dtype=torch.int32, device="meta"),
            "scale": torch.empty(groups.count, dtype=torch.float32, device="meta"),
        }
        if own:
            layout["table"] = torch.empty(2**states, V, dtype=torch.float16, device="meta")
        return layout

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
        own: bool,
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
        table = tensors["table"] if own else None
        if table is not None and not bool(table.isfinite().all()):
            raise QuipError("a number of its table is not finite: the file is damaged")
        return cls(
            code=code,
            bits=bits,
            states=states,
            rows=rows,
            columns=columns,
            group=group,
            order=order,
            scale=scale,
            table=table,
        )
