"""What runs of rows and of columns share: a codebook, or a number such as the step of a grid."""

import torch
from jaxtyping import Int64, Shaped
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


def even(m: int, count: int) -> list[int]:
    """The sizes of `count` parts of m, in order: the first ones may be larger by 1."""
    size, more = divmod(m, count)
    return [size + 1] * more + [size] * (count - more)


def row_groups(m: int, count: int, device: torch.device) -> Int64[Tensor, " m"]:
    """The group of each of m rows, which are cut into `count` groups as `even` does."""
    size, more = divmod(m, count)
    rows, border = torch.arange(m, device=device), more * (size + 1)
    # Without a list that would be sent to the device, for which a CUDA graph has no room.
    return torch.where(rows < border, rows // (size + 1), more + (rows - border) // max(size, 1))
