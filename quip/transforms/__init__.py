"""Changes of basis that make W and H easy to round, applied and undone exactly.

W becomes W~ = A W B^-1 and H becomes B H B^T, so that tr(W H W^T) keeps its value and
A^-1 W~ (B x) = W x. `Rescale` is a diagonal B, and `OutputRescale` a diagonal A, by which errors in
some rows count more; `Kronecker` has orthogonal A and B, each p x q blocks of small random
rotations around a permutation: O(m n (p + q)), never n x n. `Hadamard` has random signs and a
Hadamard matrix: O(m n log(m n)). `Order` is a permutation that came with a model.
"""

from typing import Any

from quip.transforms.base import Chain, Draw, Transform, rescales_outputs
from quip.transforms.hadamard import Hadamard, HadamardDraw
from quip.transforms.kronecker import Kronecker, KroneckerDraw
from quip.transforms.order import Order
from quip.transforms.rescale import OutputRescale, OutputRescaleDraw, Rescale, RescaleDraw

# By the name that a file gives them.
TRANSFORMS: dict[str, Any] = {
    "rescale": Rescale,
    "rescale_out": OutputRescale,
    "kronecker": Kronecker,
    "hadamard": Hadamard,
    "order": Order,
}

__all__ = [
    "TRANSFORMS",
    "Chain",
    "Draw",
    "Hadamard",
    "HadamardDraw",
    "Kronecker",
    "KroneckerDraw",
    "Order",
    "OutputRescale",
    "OutputRescaleDraw",
    "Rescale",
    "RescaleDraw",
    "Transform",
    "rescales_outputs",
]
