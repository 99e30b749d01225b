"""kernels/operation.py: which form computes a call."""

import torch

from quip.kernels import kronecker
from tests.laws import assert_near


def test_tensors_that_stand_for_others_take_the_reference(rng):
    """Under vmap, and in gradients of jacrev, a tensor has no memory that a kernel could read."""
    x, left, right = (torch.randn(*shape, generator=rng) for shape in ((4, 15), (3, 3), (5, 5)))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return kronecker.rotate(x, left, right, None, None)

    assert_near(torch.func.vmap(rotate)(x), rotate(x), 1e-6)
