"""What a change of basis is, and several of them one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from quip.errors import UsageError
from quip.stored import Stored


@runtime_checkable
class Transform(Stored, Protocol):
    """A frozen change of basis; its laws are in tests/laws.py."""

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], *, in_place: bool = False
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        """W and H in the other basis; with `in_place` this H takes the memory of that one."""
        ...

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]: ...

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """B x: activations entering."""
        ...

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        """A^-1 y: activations leaving."""
        ...


@runtime_checkable
class Draw(Protocol):
    """A frozen rule that makes a transform for W and H; equal rules make equal recipes."""

    def check(self, m: int, n: int) -> None:
        """Raise UsageError for an m x n matrix that the rule can make no transform for."""
        ...

    def __call__(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], rng: torch.Generator
    ) -> Transform: ...


@runtime_checkable
class OutputDraw(Protocol):
    """A Draw that may ask, beside W and H, what the loss feels of each output."""

    @property
    def rescales_outputs(self) -> bool:
        """Whether it does: it is then called with f, behind the generator."""
        ...

    def __call__(
        self,
        W: Float[Tensor, "m n"],
        H: Float[Tensor, "n n"],
        rng: torch.Generator,
        f: Float[Tensor, " m"],
    ) -> Transform: ...


def rescales_outputs(draws: Sequence[Draw]) -> bool:
    """Whether some draw asks what the loss feels of each output."""
    return any(isinstance(draw, OutputDraw) and draw.rescales_outputs for draw in draws)


@dataclass(frozen=True)
class Chain:
    """Transforms one after the other."""

    links: Sequence[Transform] = ()

    @classmethod
    def draw(
        cls,
        draws: Sequence[Draw],
        W: Tensor,
        H: Tensor,
        rng: torch.Generator,
        *,
        f: Tensor | None = None,
        in_place: bool = False,
    ) -> tuple["Chain", Tensor, Tensor]:
        """Draw each transform for what the ones before it left; also returns W and H after all.

        With `in_place` H is changed, and returned. f is what the loss feels of each output, [m];
        raises UsageError for a draw that asks for it where it is not known.
        """
        links: list[Transform] = []
        for draw in draws:
            if isinstance(draw, OutputDraw) and draw.rescales_outputs:
                if f is None:
                    raise UsageError(
                        "outputs are rescaled by what the loss feels of them, which is not known "
                        "here: quantize with `quip run`, or leave out --pre_rescale_out"
                    )
                links.append(draw(W, H, rng, f))
            else:
                links.append(draw(W, H, rng))
            W, H = links[-1].apply(W, H, in_place=in_place)
        return cls(tuple(links)), W, H

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], *, in_place: bool = False
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        for link in self.links:
            W, H = link.apply(W, H, in_place=in_place)
        return W, H

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all links."""
        return {name: x for link in self.links for name, x in link.tensors().items()}

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        for link in reversed(self.links):
            W_hat = link.undo(W_hat)
        return W_hat

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        for link in self.links:
            x = link.input(x)
        return x

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        for link in reversed(self.links):
            y = link.output(y)
        return y

    def outputs(self, H_O: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
        """E[g g^T] of gradients at the outputs, in the other basis and in float64: A^-T H_O A^-1.

        What leaves is A^-1 y, so that a gradient g there is A^-T g here.
        """
        H_O = H_O.double()
        back = self.output(torch.eye(len(H_O), dtype=torch.float64, device=H_O.device))
        return back @ H_O @ back.T
