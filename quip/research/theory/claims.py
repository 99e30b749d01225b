"""One claim of a theorem, what was measured, and whether the two agree."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from quip.matrix.seeds import rng_for
from quip.research.theory.problems import correlated_hessian

Relation = Literal["=", "<=", ">="]
SIGMAS = 4  # standard errors by which a mean may miss: a chance of 1 in 16,000


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`quantity` `relation` `formula`, with both sides as numbers."""

    name: str
    quantity: str
    relation: Relation
    formula: str
    measured: float
    predicted: float
    std_error: float = 0.0  # of `measured`, where it is a mean over draws
    tolerance: float = 1e-8  # relative: float64 rounding, or how exact the formula is

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted

    @property
    def verdict(self) -> str:
        """`attained` is said of a bound that is reached, `holds` of all else that is so."""
        slack = SIGMAS * self.std_error + self.tolerance * abs(self.predicted)
        excess = self.measured - self.predicted
        if abs(excess) <= slack:
            return "holds" if self.relation == "=" else "attained"
        allowed = {"=": False, "<=": excess < 0, ">=": excess > 0}[self.relation]
        return "holds" if allowed else "violated"

    def to_row(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "verdict": self.verdict}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """n columns; `rows` of weights in a mean; `samples` Hessians, weights or runs in a supremum."""

    n: int = 64
    rows: int = 20_000
    samples: int = 50
    seed: int = 0

    def rng(self, name: str) -> torch.Generator:
        """A generator for each name, so that no claim depends on which others are measured."""
        return rng_for(self.seed, name)

    def hessian(self) -> Float[Tensor, "n n"]:
        """The one Hessian that all claims about a single H are measured on."""
        return correlated_hessian(self.n, self.rng("H"))


class Mean(TypedDict):
    """The mean of independent draws and its standard error, as a claim has them."""

    measured: float
    std_error: float


def mean(x: Float[Tensor, " draws"]) -> Mean:
    spread = float(x.std()) / len(x) ** 0.5 if len(x) > 1 else 0.0
    return Mean(measured=float(x.mean()), std_error=spread)
