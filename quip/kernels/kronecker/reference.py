"""Rotate vectors by a Kronecker product of two small matrices, between two permutations.

A vector is permuted, reshaped row-major to p x q, multiplied by a small matrix from each side,
and permuted again: 2 n (p + q) operations for n = p q numbers, not 2 n^2.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    x: Float[Tensor, "*batch n"],
    left: Float[Tensor, "p p"],
    right: Float[Tensor, "q q"],
    first: Int[Tensor, " n"] | None,
    last: Int[Tensor, " n"] | None,
) -> Float[Tensor, "*batch n"]:
    """P' (left (x) right^T) P x on the last axis, in the dtype of x, which both matrices have.

    With X = x[first] as p x q, n = p q, it is Y[last], Y = left X right. None leaves an order as
    it is. What this makes of x, left^T, right^T and the inverse permutations, the last one first,
    undo where both matrices are orthogonal.
    """
    if first is not None:
        x = x.index_select(-1, first)
    X = x.reshape(*x.shape[:-1], len(left), len(right))
    y = torch.matmul(torch.matmul(left, X), right).reshape(x.shape)
    return y if last is None else y.index_select(-1, last)
