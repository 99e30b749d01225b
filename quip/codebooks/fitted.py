"""The books of a matrix, one for each group or code, held as one tensor until one is asked for."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from quip.codebooks.base import Codebook

AnyCodebook = TypeVar("AnyCodebook", bound=Codebook)


class Fitted(Sequence[AnyCodebook]):
    """A codebook with each of many scalars in the place of one of its fields, made when asked for.

    A matrix has thousands. As long as nobody asks for one, a GPU waits for none.
    """

    def __init__(self, book: AnyCodebook, values: Float[Tensor, " books"], name: str) -> None:
        self.book, self.values, self.name = book, values, name

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[AnyCodebook]:
        return map(self._with, self.values.unbind())

    def __getitem__(self, at: Any) -> Any:
        found = self.values[at]
        return self._with(found) if found.ndim == 0 else Fitted(self.book, found, self.name)

    def _with(self, value: Tensor) -> AnyCodebook:
        """`replace(self.book, ...)` at a tenth of its time."""
        book = object.__new__(type(self.book))
        book.__dict__.update(self.book.__dict__, **{self.name: value})
        return book


def one_after_another(parts: Sequence[Sequence[Codebook]]) -> Sequence[Codebook]:
    """All books of the parts, which are of one kind."""
    fitted = [part for part in parts if isinstance(part, Fitted)]
    if fitted and len(fitted) == len(parts):
        values = torch.cat([part.values for part in fitted])
        return Fitted(fitted[0].book, values, fitted[0].name)
    return list(chain.from_iterable(parts))


def chosen(books: Sequence[Codebook], places: list[int]) -> Sequence[Codebook]:
    """The books of these places, in their order."""
    return books[places] if isinstance(books, Fitted) else [books[i] for i in places]


def side_by_side(books: Sequence[Codebook], name: str) -> Float[Tensor, "books ..."]:
    """A field of each of the books, one after the other; what is one tensor is not copied."""
    if isinstance(books, Fitted) and name == books.name:
        return books.values
    found = [getattr(book, name) for book in ([books.book] if isinstance(books, Fitted) else books)]
    return torch.stack(found) if len(found) > 1 else found[0].expand(len(books), *found[0].shape)
