"""QuIP#'s rotations: random signs and a Hadamard matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from quip.errors import QuipError
from quip.kernels import hadamard
from quip.shapes import Within
from quip.stored import Options
from quip.transforms.panels import turn_columns, turn_rows
from quip.transforms.rescale import balanced

SIGNS = torch.float16  # of finer steps than bfloat16 near 1, where fine-tuned signs stay


@dataclass(frozen=True)
class Hadamard:
    """The randomized Hadamard transform (QuIP#, section 3): with Omega orthogonal and S diagonal,

        W~ = Omega_m^T S_out^-1 W S_in^-1 Omega_n,   H~ = Omega_n^T S_in H S_in Omega_n,
        W_hat = S_out Omega_m W~_hat Omega_n^T S_in.

    S_in and S_out are drawn as random signs, S_out perhaps times factors that rescale the outputs
    (quip.transforms.rescale). Fine-tuning may make them any numbers, and files of
    EXL3 hold scales in their place, 0 for an output that is always 0: that has no inverse, which
    `apply` takes and nothing else.
    """

    signs_in: Float[Tensor, " n"]
    signs_out: Float[Tensor, " m"]
    block: int | None = None  # Omega is block diagonal with blocks of this size; None: one block

    def options(self) -> Options:
        return {"block": self.block}

    def tensors(self) -> dict[str, Tensor]:
        return {"signs_in": self.signs_in.to(SIGNS), "signs_out": self.signs_out.to(SIGNS)}

    @classmethod
    def empty(cls, m: int, n: int, *, block: Annotated[int, Within(1)] | None) -> dict[str, Tensor]:
        sizes = {"signs_in": n, "signs_out": m}
        return {k: torch.empty(size, dtype=SIGNS, device="meta") for k, size in sizes.items()}

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], m: int, n: int, *, block: int | None
    ) -> "Hadamard":
        for size in (m, n):
            hadamard.check(size, block)
        signs_in, signs_out = tensors["signs_in"].float(), tensors["signs_out"].float()
        for signs in (signs_in, signs_out):
            if not bool(signs.isfinite().all()):
                raise QuipError(
                    "a sign of its Hadamard transform is not finite: the file is damaged"
                )
        return cls(signs_in, signs_out, block)

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], *, in_place: bool = False
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        turned = partial(hadamard.invert, block=self.block)
        W = turned(W, signs=1 / self.signs_in.to(W))
        turned_rows = partial(hadamard.invert_rows, block=self.block)
        W = turned_rows(W, signs=1 / self.signs_out.to(W))
        H = H if in_place else H.clone()
        turn_rows(H, partial(turned, signs=self.signs_in))
        turn_columns(H, partial(turned_rows, signs=self.signs_in))
        return W, H

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        W = hadamard.rotate(W_hat, block=self.block, signs=self.signs_in)
        return hadamard.rotate_rows(W, block=self.block, signs=self.signs_out)

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return hadamard.invert(x, block=self.block, signs=self.signs_in)

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return hadamard.rotate(y, block=self.block, signs=self.signs_out)


@dataclass(frozen=True)
class HadamardDraw:
    """Random signs, and a Hadamard matrix for every `block` columns (None: one for all)."""

    block: int | None
    rescales_outputs: bool = False  # by factors in the signs of outputs, where they cost no bit

    def check(self, m: int, n: int) -> None:
        """Raise UsageError where no Hadamard matrix fits m rows or n columns."""
        for size in (m, n):
            hadamard.check(size, self.block)

    def __call__(
        self,
        W: Float[Tensor, "m n"],
        H: Float[Tensor, "n n"],
        rng: torch.Generator,
        f: Float[Tensor, " m"] | None = None,
    ) -> Hadamard:
        """Signs of n inputs, then of m outputs; with f, what the loss feels of these, rescaled.

        Raises UsageError as `check` does.
        """
        m, n = W.shape
        self.check(m, n)
        signs = 2.0 * torch.randint(2, (n + m,), generator=rng) - 1
        signs = signs.to(W)
        signs_out = signs[n:] if f is None else signs[n:] * balanced(W, f, SIGNS)
        return Hadamard(signs[:n], signs_out, self.block)
