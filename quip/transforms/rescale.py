"""Rescaling of the inputs, to balance W against H."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quip.errors import QuipError
from quip.stored import Options
from quip.transforms.haar import FILE_DTYPE


@dataclass(frozen=True)
class Rescale:
    """W diag(r), diag(r)^-1 H diag(r)^-1 (QuIP, Algorithm 1, line 4)."""

    r: Float[Tensor, " n"]

    def options(self) -> Options:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {"rescale": self.r.to(FILE_DTYPE)}

    @classmethod
    def empty(cls, m: int, n: int) -> dict[str, Tensor]:
        return {"rescale": torch.empty(n, dtype=FILE_DTYPE, device="meta")}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], m: int, n: int) -> "Rescale":
        r = tensors["rescale"].float()
        if not bool(((r > 0) & r.isfinite()).all()):
            raise QuipError("a factor of its rescaling is not positive: the file is damaged")
        return cls(r)

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], *, in_place: bool = False
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        H = H if in_place else H.clone()
        return W * self.r, H.div_(self.r).div_(self.r[:, None])

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return W_hat / self.r.to(W_hat)

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return x / self.r.to(x)

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return y


@dataclass(frozen=True)
class RescaleDraw:
    """The r that balances W against H; there is one for every matrix."""

    def check(self, m: int, n: int) -> None:
        """Every size will do."""

    def __call__(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], rng: torch.Generator
    ) -> Rescale:
        """r_j = (H_jj / (W^T W)_jj)^(1/4), the minimiser of tr(H) |W|_F^2; rng is not used.

        A column of W that is zero counts as an average one, and so does an input that always is:
        any positive r would do, but a small one would blow up what undo makes of that column.
        """
        r = (_filled(H.diagonal()) / _filled(W.square().sum(0))).pow(0.25)
        return Rescale((r / r.mean()).clamp_min(1e-8).to(FILE_DTYPE).to(W.dtype))


def _filled(sizes: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Zeros replaced by the mean of all, or by 1 if there is nothing else."""
    return torch.where(sizes > 0, sizes, sizes.mean() if bool(sizes.any()) else 1.0)
