"""One matrix through the house: condition, transform, order, feedback, sweep, polish."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, product
from types import MappingProxyType
from typing import TypeVar

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks.base import Codebook, Decoder, Groups
from quip.codebooks.fitted import chosen
from quip.matrix.linalg import energy
from quip.matrix.prepare import Factored, Factorisations, damped, keys
from quip.matrix.recipe import Recipe
from quip.matrix.seeds import rng_for
from quip.matrix.sweep import sweep
from quip.matrix.two_sided import Sided, two_sided_loss
from quip.packed.matrix import QuantizedMatrix

Label = TypeVar("Label", bound=Hashable)
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


def quantize_matrix(
    W: Float[Tensor, "m n"],
    H: Float[Tensor, "n n"],
    recipe: Recipe,
    *,
    rng: torch.Generator,
    name: str = "the matrix",
    f: Float[Tensor, " m"] | None = None,
    H_O: Float[Tensor, "m m"] | None = None,
) -> QuantizedMatrix:
    """Round W so that tr((W_hat - W) H (W_hat - W)^T) is small (QuIP, Algorithm 3).

    f is what the loss feels of each output, for recipes that rescale them. With H_O, E[g g^T] of
    gradients g at the outputs, tr(H_O (W_hat - W) H (W_hat - W)^T) is made small instead
    (quip.matrix.two_sided), without the recipe's polish, which does not know it. Rounding runs in
    float32 (float64 for float64 W) on W's device, factorisations in float64.

    Raises:
        UsageError: the recipe cannot do a matrix of this size, or asks for f where it is None.
        NonFinite: W or H holds NaN or infinity.
        NotPositiveDefinite: H has no Cholesky factor after three escalations of damping.
    """
    recipe.check(len(W), W.shape[1], name)
    sized = recipe.sized(*W.shape)
    if H_O is not None:
        sized = replace(sized, polish=())
    return _quantize(W, Factorisations(H), sized, rng, name, f, H_O)


def quantize_matrices(
    weights: Mapping[str, Float[Tensor, "_m n"]],
    H: Float[Tensor, "n n"],
    recipe: Recipe,
    *,
    seed: int,
    outputs: Mapping[str, Float[Tensor, " _m"]] = NOTHING,
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """`quantize_matrix` for all matrices that share the input statistics H, one after the other.

    Each matrix draws from a generator of its own, so results do not depend on the company.
    """
    for name, _, quantized in quantize_by_many(
        weights, H, {"": recipe}, seed=seed, outputs=outputs
    ):
        yield name, quantized


def quantize_by_many(
    weights: Mapping[str, Float[Tensor, "_m n"]],
    H: Float[Tensor, "n n"],
    recipes: Mapping[Label, Recipe],
    *,
    seed: int,
    outputs: Mapping[str, Float[Tensor, " _m"]] = NOTHING,
) -> Iterator[tuple[str, Label, QuantizedMatrix]]:
    """`quantize_matrix` of each matrix by each recipe: its name, the recipe's label, the result.

    They come in the order of the work, so that what several have in common is computed once:
    recipes that differ in their codebooks alone share a factorisation of H, which takes as long
    as rounding or (Algorithm 5) far longer; without transforms all matrices do. `outputs` are f of
    each matrix, where it is known.
    """
    factorisations = Factorisations(H, recipes=len(recipes))
    bases: dict[Hashable, dict[Hashable, list[tuple[str, Label]]]] = {}
    for name, label in product(weights, recipes):
        basis, factored = keys(name, recipes[label].sized(*weights[name].shape))
        bases.setdefault(basis, {}).setdefault(factored, []).append((name, label))
    todo = [one for work in bases.values() for one in chain.from_iterable(work.values())]
    for done, (name, label) in enumerate(todo, 1):
        W, rng = weights[name], rng_for(seed, name)
        sized = recipes[label].sized(*W.shape)
        found = _quantize(W, factorisations, sized, rng, name, outputs.get(name))
        if done == len(todo):
            factorisations.forget()  # as large as H, while the caller works on
        yield name, label, found


def _quantize(
    W: Tensor,
    factorisations: Factorisations,
    recipe: Recipe,
    rng: torch.Generator,
    name: str,
    felt: Tensor | None,
    H_O: Tensor | None = None,
) -> QuantizedMatrix:
    T, W_t, f = factorisations.of(W, recipe, rng, name, felt)
    sided: Sided | None = None
    if H_O is not None:
        H_O = damped(T.outputs(H_O), recipe.damp)
        sided = Sided.of(recipe.codebook, H_O)  # whose tiles are those of all trials
    W_t = W_t[:, f.order].to(torch.float64 if W.dtype == torch.float64 else torch.float32)
    if sided:  # once, and not for each group that the codebook is fitted to
        sided = replace(sided, K=sided.K.to(W_t))
    best: tuple[float, QuantizedMatrix] | None = None
    for book in recipe.trials or (recipe.codebook,):
        rounding = replace(sided, book=book) if sided else book
        codes, decoder = _round(W_t, f, rounding.seeded(rng), recipe)
        found = QuantizedMatrix(codes=codes, decoder=decoder, transform=T, damp=f.damp, book=book)
        loss = _loss(W_t, f, found, H_O) if recipe.trials else 0.0
        if best is None or loss < best[0]:
            best = loss, found
    assert best is not None
    return best[1]


def _round(W_t: Tensor, f: Factored, book: Codebook, recipe: Recipe) -> tuple[Tensor, Decoder]:
    """The codes of the columns in natural order, and what decodes them."""
    if recipe.group is None:
        book = book.fit(W_t, f.h.to(W_t))
    if recipe.clamp_target:
        W_t = book.clamp(W_t)
    codes, books = sweep_and_polish(W_t, f, book, recipe)
    groups = Groups(codes.shape[1], recipe.group and recipe.group // book.dim)
    return book.split(codes), book.joined(books, groups)


def sweep_and_polish(
    W: Float[Tensor, "m n"], f: Factored, book: Codebook, recipe: Recipe
) -> tuple[Integer[Tensor, "m k"], Sequence[Codebook]]:
    """(codes, books) with columns and groups in natural order, of W with columns as f orders them.

    The recipe says the polish and the group; with a group `book` is refitted to each, without one
    it must be fitted already. Transforms and trials are not looked at.
    """
    codes, books = sweep(W, f.K, f.h, book, group=recipe.group)
    for polish in recipe.polish:
        assert f.H is not None
        codes, books = polish(W, f.H, codes, books, group=recipe.group)
    place = torch.argsort(f.order[:: book.dim]).cpu()  # of each column of codes in the sweep
    if recipe.group:
        size = recipe.group // book.dim
        books = chosen(books, [p // size for p in place[::size].tolist()])
    return codes[:, place.to(codes.device)], books


def _loss(W_t: Tensor, f: Factored, found: QuantizedMatrix, H_O: Tensor | None) -> float:
    """tr(E H E^T), or tr(H_O E H E^T), in the basis of the transform."""
    assert f.H is not None
    E = found.decoder.decode(found.codes)[:, f.order].double() - W_t.double()
    return energy(E, f.H) if H_O is None else two_sided_loss(E, H_O, f.H)
