"""H = E[x x^T], the second moment of a layer's inputs, which the papers call its Hessian."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from quip.kernels.hessian import add_products

CHUNK = 8192  # tokens summed in float32 before they enter the float64 master


class Hessian:
    """The means of x x^T and of x over all tokens seen, accumulated on the device of the inputs.

    Chunks of at most 8192 tokens are summed in float32 (float64 for float64 inputs) and added
    to a float64 master: exact enough for any number of tokens, at the speed of float32, or on a
    CUDA device at that of its tensor cores for inputs of 16 bits.
    """

    def __init__(self, n: int, *, device: torch.device | str = "cpu") -> None:
        self._lower = torch.zeros(n, n, dtype=torch.float64, device=device)
        self._sum = torch.zeros(n, dtype=torch.float64, device=device)
        self.count = 0

    def update(self, x: Float[Tensor, "*batch n"]) -> None:
        """Add the tokens of x, whatever its leading axes."""
        for chunk in x.detach().reshape(-1, len(self._lower)).split(CHUNK):
            add_products(self._lower, chunk)
            self._sum += chunk.sum(0, dtype=torch.float64)
            self.count += len(chunk)

    def value(self) -> Float[Tensor, "n n"]:
        """E[x x^T], each entry rounded to a float32, in float64 and exactly symmetric.

        Rounded, because a store (quip.data.hessians) keeps float32: what a run quantizes with and
        what its store gives back are then bitwise the same. The sums of the chunks are no more
        exact than that. At least one token must have been seen.
        """
        lower = (self._lower.tril() / self.count).float().double()
        return lower + lower.tril(-1).T

    @property
    def is_finite(self) -> bool:
        """Whether the diagonal of `value` is, as it is where every input was."""
        diagonal = self._lower.diagonal() / self.count
        return bool(diagonal.float().isfinite().all())  # rounded, as `value` is

    def mean(self) -> Float[Tensor, " n"]:
        """E[x] in float64. At least one token must have been seen."""
        return self._sum / self.count


def sharing(hessians: Mapping[str, Hessian]) -> list[list[str]]:
    """The names of the matrices, those with one Hessian together."""
    groups: dict[int, list[str]] = {}
    for name, hessian in hessians.items():
        groups.setdefault(id(hessian), []).append(name)
    return list(groups.values())
