"""A Recipe says how one matrix is quantized: algorithms, not flags."""

from dataclasses import dataclass, fields, is_dataclass
from functools import partial

import torch

from quip.codebooks import Codebook
from quip.codebooks.base import FITTED
from quip.errors import UsageError
from quip.kernels import hadamard
from quip.matrix.feedback import Feedback, ldl
from quip.matrix.order import Order, natural
from quip.transforms import Draw, Hadamard


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
