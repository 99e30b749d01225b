"""What a codebook is: a finite set of points, fitted to the weights it has to serve."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from quip.stored import Stored

FITTED = {"fitted": True}  # metadata of a field that a codebook owes to the matrix, not the recipe


@dataclass(frozen=True)
class Groups:
    """`blocks` columns of codes in runs of `size` that share a codebook; the last may be short."""

    blocks: int
    size: int | None  # None: one run of all

    @property
    def count(self) -> int:
        return -(-self.blocks // self.size) if self.size else 1

    def spread(self, x: Shaped[Tensor, "r groups"]) -> Shaped[Tensor, "r blocks_or_1"]:
        """What each group has, for each of its columns; one group for all stays one column."""
        if self.size is None or self.size == 1 or self.count == 1:
            return x
        return x.repeat_interleave(self.size, dim=1)[:, : self.blocks]


def tiles(m: int, rows: int) -> list[int]:
    """The sizes of the tiles that m rows are cut into, in order: near to `rows`, and even.

    Equal but for 1, so that no tile is much shorter than the others (256 of 576: 288 and 288).
    """
    count = max(1, round(m / rows))
    size, more = divmod(m, count)
    return [size + 1] * more + [size] * (count - more)


@runtime_checkable
class Decoder(Stored, Protocol):
    """The fitted codebooks of all groups of one matrix: what turns its codes into weights.

    Beside its own tensors, `layout` has the packed codes.
    """

    @property
    def dim(self) -> int: ...

    @property
    def index_bits(self) -> int: ...

    def decode(self, codes: Integer[Tensor, "m k"]) -> Float[Tensor, "m n"]: ...


@runtime_checkable
class Codebook(Protocol):
    """`dim` weights of a row are rounded together to one code of `index_bits` bits.

    A code may depend on its neighbours in the column: rows are rounded and decoded in the tiles
    of `tiles(m, rows)`, and a tile depends on nothing outside it. `rows` is 1 where every row
    stands alone.

    Laws (tests/laws.py): decode(round(decode(c))) = decode(c); round is nearest under the
    weights h, unless the codebook says that it draws at random; tiles do not feel each other.
    """

    @property
    def dim(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def index_bits(self) -> int: ...

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> "Codebook":
        """The codebook scaled to the columns X, whose errors weigh h."""
        ...

    def seeded(self, rng: torch.Generator) -> "Codebook":
        """The codebook that draws from rng; itself if it is deterministic."""
        ...

    def clamp(self, X: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
        """X moved into the range that the fitted codebook covers."""
        ...

    def round(self, x: Float[Tensor, "m d"], h: Float[Tensor, " d"]) -> Integer[Tensor, " m"]: ...

    def decode(self, codes: Integer[Tensor, " m"]) -> Float[Tensor, "m d"]: ...

    def joined(self, books: Sequence["Codebook"], groups: Groups) -> Decoder:
        """What decodes a matrix whose groups were fitted by `books`, as a file holds it."""
        ...
