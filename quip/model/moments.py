"""What a group of matrices is quantized by: the second moments of the one input that feeds it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float, Float64
from torch import Tensor

from quip.matrix.hessian import Hessian
from quip.matrix.target import Lack
from quip.model.sensitivity.found import Sensitivity
from quip.model.sides import Side


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What was seen of the input x of a group of matrices, and what the loss feels of them."""

    H: Float[Tensor, "n n"]  # E[x x^T], or E[s x x^T] / E[s] where tokens have weights s
    count: int  # tokens that were seen
    plain: Float[Tensor, "n n"] | None = None  # E[x x^T], where H is another
    squares: Mapping[str, Float64[Tensor, ""]] = field(default_factory=dict)  # where H is weighted
    outputs: Mapping[str, Float64[Tensor, " _m"]] = field(default_factory=dict)  # where it is known
    side: Side | None = None  # what the loss feels of all outputs; None: it was not asked
    aim: "Aim | None" = None  # at what targets; None: at the weights

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        count: int,
        sums: Mapping[str, Hessian],
        plain: Mapping[str, Hessian] | None,
        felt: Sensitivity | None,
        *,
        aim: "Aim | None",
        side: Side | None,
    ) -> "Moments":
        """What is known of the input of these matrices, of which so many tokens were seen.

        The sums are let go of. Without `plain` ones they are of tokens that weigh the same.
        """
        return cls(
            H=sums[names[0]].take(),
            count=count,
            plain=None if plain is None else plain[names[0]].take(),
            squares=felt.squares(names) if felt and plain else {},
            outputs=felt.outputs(names) if felt else {},
            side=side,
            aim=aim,
        )


@dataclass(frozen=True)
class Aim:
    """What the outputs of the matrices lack, and how much of that their targets make up for."""

    lack: Lack
    alpha: float | Lack  # a share; or what they lack on windows held out, to choose one by
