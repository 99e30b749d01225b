"""W and H before the sweep: conditioned, damped, transformed, ordered, factorised; and kept."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quip.errors import NonFinite, NotPositiveDefinite
from quip.matrix.recipe import Recipe
from quip.transforms import Chain

ESCALATIONS = 3  # times that damping is multiplied by 10 before giving up


@dataclass(frozen=True)
class Basis:
    """A matrix and its damped H after the transforms, and where the draws left the generator."""

    T: Chain
    W: Float[Tensor, "m n"]
    H: Float[Tensor, "n n"]
    state: Tensor


@dataclass(frozen=True)
class Factored:
    """What a sweep needs to know of H: the order of columns, H in it, and its feedback."""

    order: Int[Tensor, " n"]
    H: Float[Tensor, "n n"]
    K: Float[Tensor, "n n"]
    h: Float[Tensor, " n"]
    damp: float  # as used, after escalation


class Factorisations:
    """What H was turned into last, for as long as the matrix or recipe that follows can use it.

    A transform depends on W, so a basis serves one matrix; without transforms, every matrix.
    """

    def __init__(self, H: Float[Tensor, "n n"]) -> None:
        self._H = H
        self._basis: tuple[Hashable, Basis] | None = None
        self._factored: tuple[Hashable, Factored] | None = None

    def of(
        self, W: Float[Tensor, "m n"], recipe: Recipe, rng: torch.Generator, name: str
    ) -> tuple[Chain, Float[Tensor, "m n"], Factored]:
        """The transforms, W after them (in float64 after any), and H after them, factorised.

        The generator is left as the draws leave it, whether they were made now or before.
        """
        W, H = condition(W, self._H, name)
        if recipe.transforms:
            W = W.double()
        _, key = keys(name, recipe)
        if self._factored is None or self._factored[0] != key:
            self._factored = None  # makes room
            self._factored = key, self._factorise(W, H, recipe, rng, name)
        f = self._factored[1]
        if not recipe.transforms:
            self._basis = None  # W and H but for damping: cheaper to make again than to hold
            return Chain(), W, f
        basis = self._in_basis(W, H, recipe, rng, name, f.damp)
        rng.set_state(basis.state)
        return basis.T, basis.W, f

    def _factorise(
        self, W: Tensor, H: Tensor, recipe: Recipe, rng: torch.Generator, name: str
    ) -> Factored:
        """After a failure with ten times the damping, and at least 0.001."""
        damp, reason = recipe.damp, ""
        state = rng.get_state()
        for _ in range(1 + ESCALATIONS):
            rng.set_state(state)
            try:
                return factored(self._in_basis(W, H, recipe, rng, name, damp).H, recipe, damp)
            except NotPositiveDefinite as error:
                tried, reason, damp = damp, str(error), max(10 * damp, 1e-3)
        raise NotPositiveDefinite(
            f"{name}: {reason} after damping by {tried:g} of the mean diagonal; "
            "add calibration tokens (--nsamples) or damp more (--percdamp)"
        )

    def _in_basis(
        self, W: Tensor, H: Tensor, recipe: Recipe, rng: torch.Generator, name: str, damp: float
    ) -> Basis:
        key = keys(name, recipe)[0], damp
        if self._basis is None or self._basis[0] != key:
            self._basis = None  # makes room
            drawn = Chain.draw(recipe.transforms, W, damped(H, damp), rng)
            self._basis = key, Basis(*drawn, rng.get_state())
        return self._basis[1]


def factored(H: Float[Tensor, "n n"], recipe: Recipe, damp: float = 0.0) -> Factored:
    """H, damped and transformed already, in the recipe's order and with its feedback.

    Raises NotPositiveDefinite.
    """
    dim = recipe.codebook.dim
    order = recipe.order(H, dim, recipe.group)
    H = H[order][:, order]
    return Factored(order, H, *recipe.feedback(H, dim), damp)


def damped(H: Float[Tensor, "n n"], damp: float) -> Float[Tensor, "n n"]:
    """H + damp mean(diag H) I (QuIP, Algorithm 1, line 2); the mean of a zero H counts as 1."""
    H, mean = H.clone(), H.diagonal().mean()
    H.diagonal().add_(damp * torch.where(mean == 0, 1.0, mean))
    return H


def keys(name: str, recipe: Recipe) -> tuple[Hashable, Hashable]:
    """What the basis of a matrix depends on, up to its damping, and what the factorisation does."""
    basis = (recipe.transforms, name if recipe.transforms else None)
    rule = (recipe.order, recipe.feedback, recipe.codebook.dim, recipe.group)
    return basis, (basis, recipe.damp, *rule)


def condition(
    W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], name: str = "the matrix"
) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
    """W, and H in float64; weights of inputs that are always zero become zero.

    Raises NonFinite with the name of the matrix.
    """
    finite = torch.stack([_is_finite(W), _is_finite(H)]).tolist()  # waits for the device once
    if not finite[0]:
        raise NonFinite(f"{name}: the weights hold NaN or infinity; reload or repair the model")
    if not finite[1]:
        raise NonFinite(
            f"{name}: the inputs' second moments hold NaN or infinity; "
            "run the model in a wider dtype (--dtype float32)"
        )
    dead = H.diagonal() == 0
    return W.masked_fill(dead, 0), H.double()


def _is_finite(A: Tensor) -> Tensor:
    """Whether all entries are; `isfinite` would take as much memory as A and more."""
    ends = torch.stack(A.aminmax()) if A.numel() else A.new_empty(0)
    return ends.isfinite().all()
