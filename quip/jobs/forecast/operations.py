"""How many operations each part of a run takes, from sizes alone.

With N calibration tokens, a matrix of m outputs and n inputs costs

    forward       2 m n N, twice: to observe a block, and to pass on what it has become
    observe       2 n^2 N for each distinct input, of which panels skip three eighths
    quantize      m n^2 for the sweep, 2 m n^2 for each greedy pass
    update        centroids: 2 m n^2 for each of up to 30 steps
    evaluate      2 (m n) for each token, and the vocabulary
    tune          6 m n for each token and epoch, of a block after each of its inputs, of a
                  whole model with the vocabulary

Factorisations, and what a recipe takes for the weights by themselves (searches, fits), are told by
rates.py.
"""

from collections.abc import Sequence
from typing import TypeAlias

from quip.codebooks import Learned
from quip.jobs.forecast.shape import Shape
from quip.matrix.centroids import UpdateCentroids
from quip.matrix.polish import Greedy
from quip.matrix.recipe import Recipe

PANELS = 5 / 8
Number: TypeAlias = int | float


def forward(weights: Number, tokens: Number) -> float:
    """Operations of so many tokens on their way through so many weights."""
    return 2.0 * weights * tokens


def attention(shape: Shape, tokens: Number, seqlen: int) -> float:
    """Operations of the products of queries, keys and values of all blocks, masked or not."""
    return 4.0 * shape.attention * shape.blocks * tokens * seqlen


def observing(columns: Sequence[Number], tokens: Number) -> float:
    """Operations of X^T X of inputs of these numbers of columns."""
    return PANELS * 2.0 * tokens * sum(n * n for n in columns)


def tuning(weights: Number, tokens: Number, epochs: int) -> float:
    """Operations of a forward and a backward pass of each token in each epoch."""
    return 6.0 * epochs * tokens * weights


def passes(recipe: Recipe) -> int:
    """Greedy passes after the sweep."""
    return sum(x.passes for x in recipe.polish if isinstance(x, Greedy))


def sweeping(recipe: Recipe, m: int, n: int) -> float:
    """Operations of feedback and greedy passes, and of the update of centroids."""
    steps = 0
    if isinstance(recipe.codebook, Learned):
        steps = sum(one.steps for one in recipe.polish if isinstance(one, UpdateCentroids))
    return (1.0 + 2.0 * passes(recipe) + 2.0 * steps) * m * n * n
