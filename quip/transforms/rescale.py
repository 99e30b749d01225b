"""Rescaling of the inputs, to balance W against H; and of the outputs, against what they feel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from quip.errors import QuipError
from quip.stored import Options
from quip.transforms.haar import FILE_DTYPE

FLOOR = 0.01  # of the mean, which is added to what outputs feel


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
        return cls(_positive(tensors["rescale"]))

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


@dataclass(frozen=True)
class OutputRescale:
    """diag(r)^-1 W; H stays. The mirror of Rescale."""

    r: Float[Tensor, " m"]

    def options(self) -> Options:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {"rescale_out": self.r.to(FILE_DTYPE)}

    @classmethod
    def empty(cls, m: int, n: int) -> dict[str, Tensor]:
        return {"rescale_out": torch.empty(m, dtype=FILE_DTYPE, device="meta")}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], m: int, n: int) -> "OutputRescale":
        return cls(_positive(tensors["rescale_out"]))

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], *, in_place: bool = False
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        return W / self.r[:, None], H if in_place else H.clone()

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return W_hat * self.r.to(W_hat)[:, None]

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return x

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return y * self.r.to(y)


@dataclass(frozen=True)
class OutputRescaleDraw:
    """The r that balances the rows of W against what the loss feels of each output."""

    rescales_outputs: ClassVar[bool] = True

    def check(self, m: int, n: int) -> None:
        """Every size will do."""

    def __call__(
        self,
        W: Float[Tensor, "m n"],
        H: Float[Tensor, "n n"],
        rng: torch.Generator,
        f: Float[Tensor, " m"],
    ) -> OutputRescale:
        """The r of `balanced`; H and rng are not used."""
        return OutputRescale(balanced(W, f, FILE_DTYPE))


def balanced(
    W: Float[Tensor, "m n"], f: Float[Tensor, " m"], dtype: torch.dtype
) -> Float[Tensor, " m"]:
    """r_i = (|W_i|^2 / f_i)^(1/4) over their mean, as a number of this dtype, in that of W.

    f_i = E[|x|^2 g_i^2] is what the loss feels of output i. Once a rotation has spread errors
    evenly over the rows of diag(1/r) W, the loss rises by (sum_i f_i r_i^2) (sum_i |W_i|^2 / r_i^2)
    times a constant, of which these r are the minimum. A hundredth of the mean is added to both, so
    that no row is left out, and f = |W_i|^2 gives r = 1; so does f = 0, of which nothing is known.
    """
    sizes = W.double().square().sum(1)
    ratio = _raised(sizes) / _raised(f.to(sizes))
    r = torch.where(f.any().to(ratio.device), ratio, 1.0).pow(0.25)
    return (r / r.mean()).clamp_min(2.0**-10).to(dtype).to(W.dtype)


def _raised(sizes: Float64[Tensor, " k"]) -> Float64[Tensor, " k"]:
    """With a hundredth of their mean added; ones in place of zeros alone."""
    raised = sizes + FLOOR * sizes.mean()
    return torch.where(sizes.any(), raised, 1.0)


def _positive(stored: Tensor) -> Tensor:
    r = stored.float()
    if not bool(((r > 0) & r.isfinite()).all()):
        raise QuipError("a factor of its rescaling is not positive: the file is damaged")
    return r


def _filled(sizes: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Zeros replaced by the mean of all, or by 1 if there is nothing else."""
    return torch.where(sizes > 0, sizes, sizes.mean() if bool(sizes.any()) else 1.0)
