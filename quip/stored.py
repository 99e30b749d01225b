"""What the parts of a quantized matrix have in common: they go into a file and come back."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Options: TypeAlias = dict[str, bool | int | float | str | None]


@runtime_checkable
class Stored(Protocol):
    """A transform, or the codebooks of a matrix, as tensors and a few words.

    The words are alike for all matrices of one recipe; with them and its size, the shape of
    every tensor of a matrix is known. Law (tests/laws.py): restore(tensors()) is the same part.
    """

    def options(self) -> Options:
        """The words, fit for JSON."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, and all that is counted in bits per weight."""
        ...

    @classmethod
    def empty(cls, m: int, n: int, *_: Any, **options: Any) -> dict[str, Tensor]:
        """The tensors of an m x n matrix, without content (on the meta device).

        The types of its options, with their ranges (quip.shapes), are what a file may say.
        """
        ...

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], m: int, n: int, *_: Any, **options: Any) -> Any:
        """The part whose tensors and options these are. Raises QuipError where they make none."""
        ...
