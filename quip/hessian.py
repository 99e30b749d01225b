"""H = E[x x^T], the second moment of a layer's inputs, which the papers call its Hessian."""

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 8192  # tokens summed in float32 before they enter the float64 master
PANELS = 4  # row panels; each stops at the diagonal, which saves 3/8 of the products


class Hessian:
    """The mean of x x^T over all tokens seen, accumulated on the device of the inputs.

    Chunks of at most 8192 tokens are summed in float32 (float64 for float64 inputs) and added
    to a float64 master: exact enough for any number of tokens, at the speed of float32.
    """

    def __init__(self, n: int, *, device: torch.device | str = "cpu") -> None:
        self._lower = torch.zeros(n, n, dtype=torch.float64, device=device)
        self.count = 0

    def update(self, x: Float[Tensor, "*batch n"]) -> None:
        """Add the tokens of x, whatever its leading axes."""
        n = len(self._lower)
        panel = max(64, -(-n // PANELS))
        for chunk in x.detach().reshape(-1, n).split(CHUNK):
            chunk = chunk if chunk.dtype == torch.float64 else chunk.float()
            for lo in range(0, n, panel):
                hi = min(lo + panel, n)
                self._lower[lo:hi, :hi] += chunk[:, lo:hi].T @ chunk[:, :hi]
            self.count += len(chunk)

    def value(self) -> Float[Tensor, "n n"]:
        """The mean in float64, exactly symmetric. At least one token must have been seen."""
        lower = self._lower.tril()
        return (lower + lower.tril(-1).T) / self.count
