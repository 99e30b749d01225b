"""Trellis codes (QTIP): a tile of weights is rounded together, as a walk through 2^L states.

A state holds the last L bits of a string that ends where it begins and brings k bits a weight, and
each has its V values in a table or by a formula (trellis_codes.py). So a tile takes exactly k bits
a weight, and is rounded as well as points of as many dimensions as it has weights. Tiles of one
column keep the whole feedback of LDLQ, and have their dimension from their rows.

    w_hat = scale C[s_t],   scale = RMS(W) / (size target)

where target is the RMS that Gaussian weights should have when they meet the code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks.base import FITTED, Codebook, Groups, Kept, Panel, constants, tile_count
from quip.codebooks.fitted import side_by_side
from quip.codebooks.names import Bits
from quip.codebooks.trellis_codes import code, target_rms
from quip.codebooks.trellises import Trellises
from quip.errors import UsageError
from quip.kernels import trellis
from quip.kernels.lattice_panel.reference import candidate_scales
from quip.kernels.trellis import Code, Tiling

UNFITTED = torch.empty(0)


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
    own: bool = False  # whether each matrix has a table of its own, which tuning may move
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
        return trellis.split(codes, self._code(codes.device).bits, self.index_bits)

    def panel(self, W: Float[Tensor, "m n"], *, refit: bool) -> Panel | None:
        """By kernels/trellis on a CPU, without a look at Python between two columns."""
        plain = (W.dtype, W.device.type) == (torch.float32, "cpu")
        return _round_panel if plain and not refit else None

    def joined(self, books: Sequence[Codebook], groups: Groups) -> "Trellises":
        return Trellises(
            code=self.code,
            bits=self.bits,
            states=self.states,
            rows=self.rows,
            columns=self.columns,
            group=groups.size and groups.size * self.columns,
            scale=side_by_side(books, "scale").float(),  # exact: fit rounded them
            table=self._code(self.scale.device).table.half() if self.own else None,  # exact, too
        )

    def _code(self, device: torch.device) -> Code:
        made = own_code if self.own else code
        return made(self.code, self.bits, self.states, device)


@cache
def own_code(name: str, bits: Bits, L: int, device: torch.device) -> Code:
    """The code as it is in a table that a matrix has for itself: in float16."""
    found = code(name, bits, L, device)
    return Code("table", found.bits, found.table.half().float())


def _round_panel(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    h: Float[Tensor, " n"],
    books: Sequence[Trellis],
    *,
    base: Float[Tensor, "n m"] | None = None,
    kept: Kept | None = None,
    refit: bool = False,
) -> tuple[Integer[Tensor, "k m"], Sequence[Trellis]]:
    """`round_panel` of matrix/panel.py, of books that are fitted."""
    assert not refit
    book, scales = books[0], side_by_side(books, "scale")
    tiling = Tiling(tile_count(X.shape[1], book.rows), book.columns)
    here = book._code(X.device)
    return trellis.round_columns(X, K, eta, scales, here, tiling, base=base, kept=kept), books
