"""Turn a large matrix a part at a time, in its own memory."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

WIDTH = 256  # rows or columns of a part

Turn = Callable[[Tensor], Tensor]


def turn_rows(A: Float[Tensor, "m n"], turn: Turn) -> None:
    """Put what `turn` makes of each row, in its last axis, in place of the row."""
    for rows in A.split(WIDTH):
        rows.copy_(turn(rows))


def turn_columns(A: Float[Tensor, "m n"], turn: Turn) -> None:
    """Put what `turn` makes of each column, in its first axis, in place of the column."""
    for columns in A.split(WIDTH, 1):
        columns.copy_(turn(columns.contiguous()))
