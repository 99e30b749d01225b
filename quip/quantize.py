"""One matrix through the house: condition, transform, order, feedback, sweep, polish."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from quip.bits import pack
from quip.codebooks.base import Codebook, Decoder, Groups
from quip.errors import NonFinite, NotPositiveDefinite
from quip.recipe import Recipe
from quip.rounding import greedy, sweep
from quip.transforms import Chain

ESCALATIONS = 3  # times that damping is multiplied by 10 before giving up


@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """A quantized weight matrix in the basis of its transform, columns in natural order."""

    codes: Integer[Tensor, "m k"]
    decoder: Decoder
    transform: Chain
    damp: float  # as used, after escalation

    def dequantize(self) -> Float[Tensor, "m n"]:
        """W_hat in the original basis, float32."""
        return self.transform.undo(self.decoder.decode(self.codes).double()).float()

    def tensors(self) -> dict[str, Tensor]:
        """All that must be stored for the matrix; the codes as packed words."""
        codes = {"codes": pack(self.codes, self.decoder.index_bits)}
        return codes | self.decoder.tensors() | self.transform.tensors()

    @property
    def bits_per_weight(self) -> float:
        """The bits of all `tensors`, over the number of weights."""
        stored = 8 * sum(tensor.nbytes for tensor in self.tensors().values())
        return stored / (self.codes.numel() * self.decoder.dim)


@dataclass(frozen=True)
class Factored:
    """What a sweep needs to know of H: the order of columns, H in it, and its feedback."""

    order: Int[Tensor, " n"]
    H: Float[Tensor, "n n"]
    K: Float[Tensor, "n n"]
    h: Float[Tensor, " n"]


def quantize_matrix(
    W: Float[Tensor, "m n"],
    H: Float[Tensor, "n n"],
    recipe: Recipe,
    *,
    rng: torch.Generator,
    name: str = "the matrix",
) -> QuantizedMatrix:
    """Round W so that tr((W_hat - W) H (W_hat - W)^T) is small (QuIP, Algorithm 3).

    Rounding runs in float32 (float64 for float64 W) on W's device, factorisations in float64.

    Raises:
        NonFinite: W or H holds NaN or infinity.
        NotPositiveDefinite: H has no Cholesky factor after three escalations of damping.
    """
    return _quantize(W, H, recipe, rng, name, shared=None)[0]


def quantize_matrices(
    weights: Mapping[str, Float[Tensor, "_m n"]],
    H: Float[Tensor, "n n"],
    recipe: Recipe,
    *,
    seed: int,
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """`quantize_matrix` for all matrices that share the input statistics H, one after the other.

    H is factorised once where no transform stands between (a transform depends on W). Each
    matrix draws from a generator of its own, so results do not depend on the company.
    """
    shared = None
    for name, W in weights.items():
        quantized, factored = _quantize(W, H, recipe, rng_for(seed, name), name, shared=shared)
        shared = None if recipe.transforms else (quantized.damp, factored)
        yield name, quantized


def rng_for(seed: int, name: str) -> torch.Generator:
    """The generator of one matrix: the same whatever else is quantized, and in any order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _quantize(
    W: Tensor,
    H: Tensor,
    recipe: Recipe,
    rng: torch.Generator,
    name: str,
    *,
    shared: tuple[float, Factored] | None,
) -> tuple[QuantizedMatrix, Factored]:
    W_d, H_0 = condition(W, H, name)
    damp, T, W_t, f = _prepare(W_d, H_0, recipe, rng, name, shared)
    W_t = W_t[:, f.order].to(torch.float64 if W.dtype == torch.float64 else torch.float32)
    books = recipe.trials or (recipe.codebook,)
    found = (_round(W_t, f, book.seeded(rng), recipe) for book in books)
    codes, decoder = min(found, key=partial(_loss, W_t, f)) if recipe.trials else next(found)
    return QuantizedMatrix(codes=codes, decoder=decoder, transform=T, damp=damp), f


def _round(W_t: Tensor, f: Factored, book: Codebook, recipe: Recipe) -> tuple[Tensor, Decoder]:
    """The codes of the columns in natural order, and what decodes them."""
    if recipe.group is None:
        book = book.fit(W_t, f.h.to(W_t))
    if recipe.clamp_target:
        W_t = book.clamp(W_t)
    codes, books = sweep(W_t, f.K, f.h, book, group=recipe.group)
    if recipe.greedy_passes:
        codes = greedy(W_t, f.H, codes, books, group=recipe.group, passes=recipe.greedy_passes)
    d = book.dim
    place = torch.argsort(f.order[::d]).cpu()  # of each column of codes in the sweep
    groups = Groups(len(place), recipe.group and recipe.group // d)
    if recipe.group:
        books = [books[int(p) * d // recipe.group] for p in place[:: groups.size]]
    return codes[:, place.to(codes.device)], book.joined(books, groups)


def _loss(W_t: Tensor, f: Factored, found: tuple[Tensor, Decoder]) -> float:
    """tr(E H E^T) in the basis of the transform."""
    codes, decoder = found
    E = decoder.decode(codes)[:, f.order].double() - W_t.double()
    return float(((E @ f.H) * E).sum())


def condition(
    W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], name: str = "the matrix"
) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
    """W and H in float64; weights of inputs that are always zero become zero.

    Raises NonFinite with the name of the matrix.
    """
    if not bool(torch.isfinite(W).all()):
        raise NonFinite(f"{name}: the weights hold NaN or infinity; reload or repair the model")
    if not bool(torch.isfinite(H).all()):
        raise NonFinite(
            f"{name}: the inputs' second moments hold NaN or infinity; "
            "run the model in a wider dtype (--dtype float32)"
        )
    dead = H.diagonal() == 0
    return W.double().masked_fill(dead, 0), H.double()


def _prepare(
    W: Tensor,
    H: Tensor,
    recipe: Recipe,
    rng: torch.Generator,
    name: str,
    shared: tuple[float, Factored] | None,
) -> tuple[float, Chain, Tensor, Factored]:
    """Damp, transform and factorise; after a failure ten times the damping, and at least 0.001."""
    if shared is not None:
        return shared[0], Chain(), W, shared[1]
    damp, mean = recipe.damp, float(H.diagonal().mean()) or 1.0
    state, reason = rng.get_state(), ""
    for _ in range(1 + ESCALATIONS):
        rng.set_state(state)
        H_d = H.clone()
        H_d.diagonal().add_(damp * mean)
        try:
            T, W_t, H_t = Chain.draw(recipe.transforms, W, H_d, rng)
            order = recipe.order(H_t, recipe.codebook.dim, recipe.group)
            H_t = H_t[order][:, order]
            K, h = recipe.feedback(H_t, recipe.codebook.dim)
            return damp, T, W_t, Factored(order, H_t, K, h)
        except NotPositiveDefinite as error:
            tried, reason, damp = damp, str(error), max(10 * damp, 1e-3)
    raise NotPositiveDefinite(
        f"{name}: {reason} after damping by {tried:g} of the mean diagonal; "
        "add calibration tokens (--nsamples) or damp more (--percdamp)"
    )
