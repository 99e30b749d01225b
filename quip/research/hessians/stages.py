"""One H, and W with it, from stage to stage of incoherence processing, each with its numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from quip.errors import NotPositiveDefinite
from quip.matrix.prepare import condition, damped
from quip.research.hessians.spectrum import HessianNumbers, Spectrum, hessian_numbers
from quip.transforms import Draw, Rescale, Transform


@dataclass(frozen=True)
class Stage:
    """H and the damped H in one basis. A run damps first: what it turns is the damped H."""

    name: str  # of the matrix or input
    processing: str
    H: Float[Tensor, "n n"]
    H_damped: Float[Tensor, "n n"]
    spectrum: Spectrum  # of H
    mean: Float[Tensor, " n"]  # E[x]

    @classmethod
    def original(
        cls, name: str, H: Float[Tensor, "n n"], mean: Float[Tensor, " n"], *, damp: float
    ) -> "Stage":
        """As collected. Raises NonFinite, or NotPositiveDefinite if H is 0."""
        _, H = condition(H.new_zeros(1, len(H)), H, name)
        if not bool(H.any()):
            raise NotPositiveDefinite(f"{name}: its inputs were always 0; collect H on other text")
        return cls(name, "original", H, damped(H, damp), Spectrum.of(H), mean)

    @cached_property
    def numbers(self) -> HessianNumbers:
        """Raises NotPositiveDefinite, naming the matrix."""
        try:
            return hessian_numbers(self.spectrum, self.H_damped, self.mean)
        except NotPositiveDefinite as error:
            raise NotPositiveDefinite(
                f"{self.name}, {self.processing}: {error}; damp more (--percdamp)"
            ) from error


def processed(
    stage: Stage, W: Float[Tensor, "m n"], draws: Sequence[Draw], rng: torch.Generator, name: str
) -> Iterator[tuple[Stage, Float[Tensor, "m n"]]]:
    """The original with W, then both after each transform, as `Chain.draw` makes them."""
    W, _ = condition(W.double(), stage.H, name)
    yield stage, W
    done: list[str] = []
    for draw in draws:
        T = draw(W, stage.H_damped, rng)
        done.append("rescaled" if isinstance(T, Rescale) else "rotated")
        W, H_damped = T.apply(W, stage.H_damped)
        H = _on_both_sides(T, stage.H)
        # A rotation turns eigenvectors, and leaves the eigenvalues.
        spectrum = Spectrum.of(H) if isinstance(T, Rescale) else stage.spectrum.turned(T)
        stage = Stage(name, " and ".join(done), H, H_damped, spectrum, T.input(stage.mean))
        yield stage, W


def _on_both_sides(T: Transform, H: Tensor) -> Tensor:
    """B H B^T, where `input` is x -> B x on the last axis."""
    return T.input(T.input(H).T)
