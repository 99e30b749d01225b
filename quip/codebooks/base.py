"""What a codebook is: a finite set of points, fitted to the weights it has to serve.

A codebook inherits from `Codebook`, and what a file holds of it from `Decoder`: both have defaults
for what only some of them do faster.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor
from torch.nn.functional import linear

from quip.kernels.bits import unpack
from quip.kernels.groups import even
from quip.shapes import Within
from quip.stored import Stored

Kept = tuple[Tensor, Tensor]  # codes, metrics
Panel = Callable[..., tuple[Tensor, Sequence["Codebook"]]]  # `round_panel` of matrix/panel.py
Columns: TypeAlias = Annotated[int, Within(1)]  # of a group
FITTED = {"fitted": True}  # metadata of a field that a codebook owes to the matrix, not the recipe


@dataclass(frozen=True)
class Groups:
    """`columns` columns of codes in runs of `size` that share a codebook; the last may be short."""

    columns: int
    size: int | None  # None: one run of all

    @property
    def count(self) -> int:
        return -(-self.columns // self.size) if self.size else 1


@lru_cache(maxsize=64)  # a copy to a GPU waits there for all that was asked of it before
def constants(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Float[Tensor, " values"]:
    """The values as a tensor, which is not to be written to."""
    return torch.tensor(values, dtype=dtype, device=device)


def tiles(m: int, rows: int) -> list[int]:
    """The sizes of the tiles that m rows are cut into, in order: near to `rows`, and even.

    Equal but for 1, so that no tile is much shorter than the others (256 of 576: 288 and 288).
    """
    return even(m, tile_count(m, rows))


def tile_count(m: int, rows: int) -> int:
    """How many tiles `tiles` makes."""
    return max(1, round(m / rows))


@runtime_checkable
class Decoder(Stored, Protocol):
    """The fitted codebooks of all groups of one matrix: what turns its codes into weights.

    Beside its own tensors, `empty` has the packed codes.
    """

    @property
    def dim(self) -> int: ...

    @property
    def index_bits(self) -> int: ...

    def decode(self, codes: Integer[Tensor, "m k"]) -> Float[Tensor, "m n"]:
        """W~, the weights of these codes: a row for each of theirs, n = k dim."""
        ...

    def dense(
        self, words: Int32[Tensor, "m words"], n: int, dtype: torch.dtype
    ) -> Float[Tensor, "m n"]:
        """W~ of packed codes, rounded to `dtype`."""
        return self.decode(unpack(words, self.index_bits, n // self.dim)).to(dtype)

    def multiply(
        self, words: Int32[Tensor, "m words"], x: Float[Tensor, "*batch n"], dtype: torch.dtype
    ) -> Float[Tensor, "*batch m"]:
        """x W~^T for packed codes, in the dtype of x; both factors are rounded to `dtype` first.

        A fast form for a few vectors may compute in the dtype of x instead, rounding nothing.
        """
        codes = unpack(words, self.index_bits, x.shape[-1] // self.dim)
        return linear(x.to(dtype), self.decode(codes).to(dtype)).to(x.dtype)

    def learnable(self) -> dict[str, Tensor]:
        """What tuning may move, in float32: numbers from which weights are decoded."""
        return {}

    def prepared(self, codes: Integer[Tensor, "m k"]) -> Integer[Tensor, "m k"]:
        """What tuning keeps of codes for `decode_with`, which takes that in place of them."""
        return codes

    def decode_with(
        self, codes: Integer[Tensor, "m k"], values: Mapping[str, Tensor]
    ) -> Float[Tensor, "m n"]:
        """W~ of `prepared` codes with these for what is `learnable`; gradients reach them."""
        return self.decode(codes)

    def learned(self, values: Mapping[str, Tensor]) -> "Decoder":
        """The decoder with these in place of what is `learnable`, rounded as a file holds them."""
        return self


@runtime_checkable
class Codebook(Protocol):
    """`dim` weights of a row are rounded together to one code of `index_bits` bits.

    A code may depend on its neighbours in the column: rows are rounded and decoded in the tiles
    of `tiles(m, rows)`, and a tile depends on nothing outside it. `rows` is 1 where every row
    stands alone.

    Laws (tests/laws.py): decode(round(decode(c))) = decode(c); round is nearest under the
    weights h, unless the codebook says that it draws at random; tiles do not feel each other.

    A code is one integer from 0 to 2^index_bits - 1, in any integer dtype that holds it. A wide
    one, of up to 63 bits, holds what several parts of it say side by side, the first one lowest:
    the two stages of a lattice are c_0 | c_1 << 16, in an int64 from 32 bits on. Files have room
    for codes of up to 63 bits (kernels/bits.py); where `split` parts them before they are packed,
    they may have 64, as an int64 with any sign.
    """

    @property
    def dim(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def index_bits(self) -> int: ...

    def check(self, m: int, n: int) -> None:
        """Raise UsageError for an m x n matrix that it cannot serve; of it the message speaks."""
        return

    def sized(self, m: int, n: int, group: int | None) -> tuple["Codebook", int | None]:
        """The codebook for an m x n matrix, and the columns of its groups, where `group` are named.

        Groups may be made more even than the named ones, of which the last one may be short.
        """
        return self, group

    @property
    def first_to_last(self) -> bool:
        """Whether columns must be rounded in their order, since neighbours share something."""
        return False

    def part(self, rows: slice) -> "Codebook":
        """The fitted codebook as it serves these rows, which are whole tiles, alone."""
        return self

    def at(self, column: int) -> "Codebook":
        """The fitted codebook as it serves what follows the first `column` columns of its group."""
        return self

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> "Codebook":
        """The codebook scaled to the columns X, whose errors weigh h."""
        ...

    def seeded(self, rng: torch.Generator) -> "Codebook":
        """The codebook that draws from rng; itself if it is deterministic."""
        ...

    def clamp(self, X: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
        """X moved into the range that the fitted codebook covers."""
        ...

    def round(self, x: Float[Tensor, "m d"], h: Float[Tensor, " d"]) -> Integer[Tensor, " m"]:
        """The code of the point nearest to each row of x, in sum_i h_i (x_i - w_hat_i)^2.

        A row is `dim` neighbours of one row of W, and h the weights of the errors of its columns.
        The codebook must be fitted.
        """
        ...

    def decode(self, codes: Integer[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """The point of each code, `dim` weights, in the dtype of what the codebook was fitted to.

        Code i may mean another point in each row of W, if the codebook was fitted row by row.
        """
        ...

    def joined(self, books: Sequence["Codebook"], groups: Groups) -> Decoder:
        """What decodes a matrix whose groups were fitted by `books`, as a file holds it."""
        ...

    def split(self, codes: Integer[Tensor, "m k"]) -> Integer[Tensor, "m parts"]:
        """Codes as the decoder of `joined` has them, which may be several for one of these."""
        return codes

    def panel(self, W: Float[Tensor, "m n"], *, refit: bool) -> Panel | None:
        """A faster way to round the columns of W than a column at a time; None: there is none.

        It takes what `round_panel` of matrix/panel.py takes, and returns the same. With `refit`,
        the codebook is to be fitted to each code of it.
        """
        return None
