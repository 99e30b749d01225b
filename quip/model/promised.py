"""What was quantized is what was to be: no matrix left out, none twice, no other."""

from collections.abc import Collection, Iterable, Sequence

from torch import nn

from quip.errors import QuipError
from quip.model.matrices import coverage
from quip.model.records import MatrixRecord

NAMED = 5  # matrices, in a message


def check_block(
    name: str, records: Sequence[MatrixRecord], promised: Iterable[str], remedy: str
) -> list[str]:
    """The matrices of a block, by their records.

    Raises QuipError, naming them, unless they are those among the promised that are the block's.
    """
    found = [record.name for record in records]
    wanted = {matrix for matrix in promised if matrix.startswith(f"{name}.")}
    twice = {matrix for matrix in found if found.count(matrix) > 1}
    _refuse(wanted.symmetric_difference(found) | twice, name, remedy)
    return found


def check_all(
    model: nn.Module, done: Collection[str], promised: Collection[str], remedy: str
) -> None:
    """Raise QuipError unless all that was promised is done, and nothing in the model is left."""
    left = {*done}.symmetric_difference(promised)
    _refuse(left.union(coverage(model).quantized), type(model).__name__, remedy)


def _refuse(names: set[str], where: str, remedy: str) -> None:
    if names:
        first = ", ".join(sorted(names)[:NAMED]) + (", ..." if len(names) > NAMED else "")
        raise QuipError(
            f"{where}: {len(names)} of its matrices were left out, or are none of those to be "
            f"quantized ({first}); {remedy}"
        )
