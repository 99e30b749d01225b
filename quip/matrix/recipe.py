"""A Recipe says how one matrix is quantized: algorithms, not flags."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quip.codebooks import Codebook
from quip.codebooks.base import FITTED
from quip.errors import UsageError
from quip.kernels import hadamard
from quip.matrix.feedback import Feedback, ldl
from quip.transforms import Draw, Hadamard

Order = Callable[[Tensor, int, int | None], Tensor]


def natural(H: Float[Tensor, "n n"], dim: int, group: int | None) -> Int[Tensor, " n"]:
    """First column to last: OPTQ."""
    return torch.arange(len(H), device=H.device)


def backwards(H: Float[Tensor, "n n"], dim: int, group: int | None) -> Int[Tensor, " n"]:
    """Last column to first, in blocks of `dim`: QuIP's LDLQ as published.

    Groups are counted from the first column; a short last group stays last.
    """
    columns = natural(H, dim, group).reshape(-1, dim)
    whole = len(columns) - len(columns) % ((group or dim) // dim)
    return torch.cat([columns[:whole].flip(0), columns[whole:].flip(0)]).reshape(-1)


def largest_first(H: Float[Tensor, "n n"], dim: int, group: int | None) -> Int[Tensor, " n"]:
    """By diag(H), largest first; whole groups by their mean, and blocks of `dim` inside them.

    A short last group stays last.
    """
    weight = H.diagonal().reshape(-1, dim).mean(1)  # [n/dim]
    size = (group or len(H)) // dim
    order = [
        torch.argsort(part, descending=True, stable=True) + start * size
        for start, part in enumerate(weight.split(size))
    ]
    means = torch.stack([part.mean() for part in weight.split(size)])
    whole = means if len(weight) % size == 0 else means[:-1]
    ranks = torch.argsort(whole, descending=True, stable=True).tolist()
    blocks = torch.cat([order[g] for g in [*ranks, *range(len(ranks), len(order))]])
    return (blocks[:, None] * dim + torch.arange(dim, device=H.device)).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one matrix is quantized: algorithms, not flags.

    `group` is the number of columns that share one fit of the codebook, refitted to the
    running weights during the sweep (None: one fit for the matrix, before it). `clamp_target`
    moves weights into the codebook's range before any feedback, so that the error of the clip
    is lost to it: the paper's Algorithm 1, line 7. `trials` are codebooks that are each tried
    instead of `codebook`; the one with the smallest proxy loss is kept. With `stack`, matrices of
    the same inputs are quantized as one.
    """

    codebook: Codebook
    transforms: tuple[Draw, ...] = ()
    order: Order = natural
    feedback: Feedback = ldl
    group: int | None = None
    damp: float = 0.01
    greedy_passes: int = 0
    clamp_target: bool = False
    trials: tuple[Codebook, ...] = ()
    stack: bool = False

    def check(self, m: int, n: int, name: str = "the matrix") -> None:
        """Raise UsageError, naming the matrix, for m outputs and n inputs that it cannot do."""
        if n % self.codebook.dim:
            raise UsageError(
                f"{name}: its {n} inputs are no multiple of {self.codebook.dim}, and the codebook "
                "rounds so many weights together; use --codebook int"
            )
        for draw in self.transforms:
            if isinstance(draw, partial) and draw.func == Hadamard.draw:
                for size in (m, n):
                    try:
                        hadamard.check(size, **draw.keywords)
                    except UsageError as error:
                        raise UsageError(f"{name}: {error}") from error

    def can_do(self, m: int, n: int) -> bool:
        """Whether `check` lets such a matrix pass."""
        try:
            self.check(m, n)
        except UsageError:
            return False
        return True


def describe(recipe: Recipe) -> dict[str, object]:
    """The recipe in words and numbers, for a report."""
    return {field.name: _plain(getattr(recipe, field.name)) for field in fields(recipe)}


def _plain(value: object) -> object:
    match value:
        case tuple():
            return [_plain(item) for item in value]
        case partial():
            return {"name": _plain(value.func), **value.keywords}
        case _ if is_dataclass(value) and not isinstance(value, type):
            shown = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in FITTED}
            return {"name": type(value).__name__, **{k: _plain(v) for k, v in shown.items()}}
        case torch.dtype():
            return str(value).removeprefix("torch.")
    return getattr(value, "__qualname__", value)
