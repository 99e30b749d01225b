"""W and H before the sweep: conditioned, damped, transformed, ordered, factorised; and kept."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quip.errors import NonFinite, NotPositiveDefinite
from quip.matrix.feedback import ldl
from quip.matrix.order import natural
from quip.matrix.recipe import Recipe
from quip.transforms import Chain
from quip.transforms.panels import turn_columns, turn_rows

ESCALATIONS = 3  # times that damping is multiplied by 10 before giving up


@dataclass(frozen=True)
class Basis:
    """A matrix after the transforms, and where their draws left the generator."""

    T: Chain
    W: Float[Tensor, "m n"]
    state: Tensor


@dataclass(frozen=True)
class Factored:
    """What a sweep needs to know of H: the order of columns, and in it the feedback.

    H itself, damped, transformed and in that order, is there for recipes that ask for it later.
    """

    order: Int[Tensor, " n"]
    H: Float[Tensor, "n n"] | None
    K: Float[Tensor, "n n"]
    h: Float[Tensor, " n"]
    damp: float  # as used, after escalation


class Factorisations:
    """What H was turned into last, for as long as the matrix or recipe that follows can use it.

    A transform depends on W, so that what it leaves of H serves one matrix; H itself, every matrix.
    Only one matrix of the size of H is worked on, in place, and H is never changed.
    """

    def __init__(self, H: Float[Tensor, "n n"], *, recipes: int = 1) -> None:
        """`recipes` are those that each matrix is rounded by, one right after the other."""
        self._H, self._recipes = H, recipes
        self._last: tuple[Hashable, Basis | None, Factored] | None = None

    def of(
        self,
        W: Float[Tensor, "m n"],
        recipe: Recipe,
        rng: torch.Generator,
        name: str,
        f: Float[Tensor, " m"] | None = None,
    ) -> tuple[Chain, Float[Tensor, "m n"], Factored]:
        """The transforms, W after them (in float64 after any), and H after them, factorised.

        f is what the loss feels of each output, for transforms that ask for it.
        The generator is left as the draws leave it, whether they were made now or before.
        """
        W = without_dead(W, self._H, name)
        if recipe.transforms:
            W = W.double()
        _, key = keys(name, recipe)
        if self._last is None or self._last[0] != key:
            self._last = None  # makes room
            self._last = key, *self._factorise(W, recipe, rng, name, f)
        _, basis, found = self._last
        if basis is None:
            return Chain(), W, found
        rng.set_state(basis.state)
        if self._recipes == 1:
            self._last = None  # which is of this matrix alone: its caller lets go of it sooner
        return basis.T, basis.W, found

    def forget(self) -> None:
        """Let go of what nobody will ask for."""
        self._last = None

    def _factorise(
        self, W: Tensor, recipe: Recipe, rng: torch.Generator, name: str, f: Tensor | None
    ) -> tuple[Basis | None, Factored]:
        """After a failure with ten times the damping, and at least 0.001."""
        reason, state = "", rng.get_state()
        for attempt, damp in enumerate(dampings(recipe.damp)):
            rng.set_state(state)
            H = damped(self._H, damp)
            T, W_t, H = Chain.draw(recipe.transforms, W, H, rng, f=f, in_place=True)
            basis = Basis(T, W_t, rng.get_state()) if recipe.transforms else None
            try:  # the last failure can say why
                return basis, factored(H, recipe, damp, in_place=attempt < ESCALATIONS)
            except NotPositiveDefinite as error:
                reason = str(error)
        raise NotPositiveDefinite(
            f"{name}: {reason} after damping by {damp:g} of the mean diagonal; "
            "add calibration tokens (--nsamples) or damp more (--percdamp)"
        )


def factored(
    H: Float[Tensor, "n n"], recipe: Recipe, damp: float = 0.0, *, in_place: bool = False
) -> Factored:
    """H, damped and transformed already, in the recipe's order and with its feedback.

    With `in_place` H, in float64 and contiguous, is lost. Raises NotPositiveDefinite.
    """
    dim = recipe.codebook.dim
    order = recipe.order(H, dim, recipe.group)
    H = H if in_place else H.clone()
    if recipe.order is not natural:
        turn_rows(H, lambda rows: rows[:, order])
        turn_columns(H, lambda columns: columns[order])
    kept = H if asks_for_h(recipe) else None
    if in_place and kept is None and recipe.feedback is ldl:
        return Factored(order, None, *ldl(H, dim, in_place=True), damp)
    return Factored(order, kept, *recipe.feedback(H, dim), damp)


def asks_for_h(recipe: Recipe) -> bool:
    """Whether H is read after the sweep."""
    return bool(recipe.polish or recipe.trials)


def dampings(damp: float) -> list[float]:
    """What H is damped by, one after the other as factorisations fail: each ten times the last."""
    found = [damp]
    for _ in range(ESCALATIONS):
        found.append(max(10 * found[-1], 1e-3))
    return found


def damped(H: Float[Tensor, "n n"], damp: float) -> Float[Tensor, "n n"]:
    """H + damp mean(diag H) I in float64 (QuIP, Algorithm 1, line 2).

    The mean of a zero H counts as 1.
    """
    H = H.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    mean = H.diagonal().mean()
    H.diagonal().add_(damp * torch.where(mean == 0, 1.0, mean))
    return H


def keys(name: str, recipe: Recipe) -> tuple[Hashable, Hashable]:
    """What the basis of a matrix depends on, up to its damping, and what the factorisation does."""
    basis = (recipe.transforms, name if recipe.transforms else None)
    later = asks_for_h(recipe)
    rule = (recipe.order, recipe.feedback, recipe.codebook.dim, recipe.group, later)
    return basis, (basis, recipe.damp, *rule)


def condition(
    W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], name: str = "the matrix"
) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
    """W, and H in float64; weights of inputs that are always zero become zero.

    Raises NonFinite with the name of the matrix.
    """
    return without_dead(W, H, name), H.double()


def without_dead(
    W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], name: str
) -> Float[Tensor, "m n"]:
    """W with zeros for inputs that are always zero. Raises NonFinite."""
    dead = H.diagonal() == 0
    known = torch.stack([_is_finite(W), _is_finite(H), dead.any()])
    W_is, H_is, any_dead = known.tolist()  # waits for the device once
    if not W_is:
        raise NonFinite(f"{name}: the weights hold NaN or infinity; reload or repair the model")
    if not H_is:
        raise NonFinite(
            f"{name}: the inputs' second moments hold NaN or infinity; "
            "run the model in a wider dtype (--dtype float32)"
        )
    return W.masked_fill(dead, 0) if any_dead else W


def _is_finite(A: Tensor) -> Tensor:
    """Whether all entries are; `isfinite` would take as much memory as A and more."""
    ends = torch.stack(A.aminmax()) if A.numel() else A.new_empty(0)
    return ends.isfinite().all()
