"""Numbers that a run of columns shares, such as the step of a grid."""

from jaxtyping import Shaped
from torch import Tensor


def spread(
    x: Shaped[Tensor, "r groups"], size: int | None, count: int
) -> Shaped[Tensor, "r count_or_1"]:
    """What each run of `size` columns has, for each of `count` columns; the last may be short.

    One run of all, which a size of None means as well, stays one column.
    """
    if size is None or size == 1 or size >= count:
        return x
    return x.repeat_interleave(size, dim=1)[:, :count]
