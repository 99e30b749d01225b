"""A Recipe says how one matrix is quantized: algorithms, not flags."""

from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch

from quip.codebooks import Codebook
from quip.errors import UsageError
from quip.matrix.feedback import Feedback, ldl
from quip.matrix.order import Order, natural
from quip.matrix.polish import Greedy, Polish
from quip.transforms import Draw


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one matrix is quantized: algorithms, not flags.

    `group` is the number of columns that share one fit of the codebook, refitted to the
    running weights during the sweep (None: one fit for the matrix, before it). `clamp_target`
    moves weights into the codebook's range before any feedback, so that the error of the clip
    is lost to it: the paper's Algorithm 1, line 7. `polish` is what is done to the codes after the
    sweep, one after the other. `trials` are codebooks that are each tried
    instead of `codebook`; the one with the smallest proxy loss is kept. With `stack`, matrices of
    the same inputs are quantized as one.
    """

    codebook: Codebook
    transforms: tuple[Draw, ...] = ()
    order: Order = natural
    feedback: Feedback = ldl
    group: int | None = None
    damp: float = 0.01
    polish: tuple[Polish, ...] = ()
    clamp_target: bool = False
    trials: tuple[Codebook, ...] = ()
    stack: bool = False

    def __post_init__(self) -> None:
        if self.codebook.first_to_last and self.order is not natural:
            raise UsageError(
                "scales of neighbours with columns in another order than theirs: say --quant gptq "
                "(order=natural)"
            )

    def check(self, m: int, n: int, name: str = "the matrix") -> None:
        """Raise UsageError, naming the matrix, for m outputs and n inputs that it cannot do."""
        try:
            self.codebook.check(m, n)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        if n % self.codebook.dim:
            raise UsageError(
                f"{name}: its {n} inputs are no multiple of {self.codebook.dim}, and the codebook "
                "rounds so many weights together; use --codebook int"
            )
        for draw in self.transforms:
            try:
                draw.check(m, n)
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from error

    def sized(self, m: int, n: int) -> "Recipe":
        """The recipe for an m x n matrix, whose groups the codebook may make even."""
        codebook, group = self.codebook.sized(m, n, self.group)
        trials = tuple(book.sized(m, n, self.group)[0] for book in self.trials)
        return replace(self, codebook=codebook, group=group, trials=trials)

    def can_do(self, m: int, n: int) -> bool:
        """Whether `check` lets such a matrix pass."""
        try:
            self.check(m, n)
        except UsageError:
            return False
        return True


def describe(recipe: Recipe) -> dict[str, object]:
    """The recipe in words and numbers, fit for JSON: for a report, and to tell two runs apart."""
    words: dict[str, object] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        words |= _polish(value) if field.name == "polish" else {field.name: _plain(value)}
    return words


def _polish(polish: tuple[Polish, ...]) -> dict[str, object]:
    """Greedy passes by the name that run folders have always given them; others as they are."""
    passes = [one.passes for one in polish if isinstance(one, Greedy)]
    others = [_plain(one) for one in polish if not isinstance(one, Greedy)]
    return {"greedy_passes": sum(passes), **({"polish": others} if others else {})}


def _plain(value: object) -> object:
    match value:
        case tuple():
            return [_plain(item) for item in value]
        case partial():
            return {"name": _plain(value.func), **value.keywords}
        case Draw():
            return _draw(value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            shown = {f.name: getattr(value, f.name) for f in fields(value) if not f.metadata}
            return {"name": type(value).__name__, **{k: _plain(v) for k, v in shown.items()}}
        case torch.dtype():
            return str(value).removeprefix("torch.")
    return getattr(value, "__qualname__", value)


def _draw(draw: Any) -> object:
    """Its name, with the options that are not as by default."""
    name = f"{type(draw).__name__.removesuffix('Draw')}.draw"
    shown = {f.name: getattr(draw, f.name) for f in fields(draw)}
    options = {f.name: shown[f.name] for f in fields(draw) if shown[f.name] != f.default}
    return {"name": name, **options} if options else name
