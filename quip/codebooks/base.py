"""What a codebook is: a finite set of points, fitted to the weights it has to serve."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Integer
from torch import Tensor


@runtime_checkable
class Codebook(Protocol):
    """`dim` weights are rounded together to one code of `index_bits` bits.

    Laws (tests/laws.py): decode(round(decode(c))) = decode(c); round is nearest under the
    weights h, unless the codebook says that it draws at random.
    """

    @property
    def dim(self) -> int: ...

    @property
    def index_bits(self) -> int: ...

    @property
    def stored_bits(self) -> int:
        """Bits that a fitted codebook itself takes in a file."""
        ...

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, "g"]) -> "Codebook":
        """The codebook scaled to the columns X, whose errors weigh h."""
        ...

    def seeded(self, rng: torch.Generator) -> "Codebook":
        """The codebook that draws from rng; itself if it is deterministic."""
        ...

    def clamp(self, X: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
        """X moved into the range that the fitted codebook covers."""
        ...

    def round(self, x: Float[Tensor, "m d"], h: Float[Tensor, "d"]) -> Integer[Tensor, "m"]: ...

    def decode(self, codes: Integer[Tensor, "m"]) -> Float[Tensor, "m d"]: ...
