"""Single matrices, quantized by any recipe, and a feedback that fails."""

from torch import Tensor

from quip.codebooks import MinMaxGrid
from quip.errors import NotPositiveDefinite
from quip.matrix import feedback
from quip.matrix.quantize import quantize_matrix
from quip.matrix.recipe import Recipe
from quip.matrix.seeds import rng_for
from quip.packed.matrix import QuantizedMatrix


def quantized(W: Tensor, H: Tensor, built: Recipe, *, name: str = "w") -> QuantizedMatrix:
    return quantize_matrix(W, H, built, rng=rng_for(0, name), name=name)


def plain(**fields_) -> Recipe:
    return Recipe(**{"codebook": MinMaxGrid(bits=2), **fields_})


def failing(times: int, seen: list[float] | None = None):
    """LDL feedback that fails the first `times` times."""
    left = [times]

    def rule(H: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if seen is not None:
            seen.append(float(H.diagonal().mean()))
        left[0] -= 1
        if left[0] >= 0:
            raise NotPositiveDefinite("the smallest eigenvalue is -1.00e-09")
        return feedback.ldl(H, dim)

    return rule
