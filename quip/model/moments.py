"""What a group of matrices is quantized by: the second moments of the one input that feeds it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What was seen of the input x of a group of matrices."""

    H: Float[Tensor, "n n"]  # E[x x^T]
    count: int  # tokens that were seen
