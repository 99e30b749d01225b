"""What was felt, of all processes together: the weights of tokens, and what outputs feel."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float32, Float64, Shaped
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What the loss of a model feels of its matrices, and of its tokens.

    `windows` have an axis of windows first, of all of them or of those of one process:

        tokens INPUT        s_t = |g_t|^2 of each token, summed over the matrices that it feeds
        sent EXPERTS        the experts that the router sent a token to
        slots EXPERTS.PART  s_t of this matrix of each of those

    and `sums` are of all tokens, in nats and per token:

        means ...           the mean of s_t: of an input, or of each expert that was sent tokens
        outputs MATRIX      f_i = E[|x_t|^2 g_ti^2] of each output
        squares MATRIX      E[|g_t|^2]
    """

    kind: str
    windows: Mapping[str, Shaped[Tensor, "_count seqlen *slots"]]
    sums: Mapping[str, Float64[Tensor, "..."]]

    def roots(self, name: str) -> Float32[Tensor, " tokens"] | None:
        """sqrt(s_t / mean s) of each token of an input; None: all tokens count the same."""
        tokens, mean = self.windows.get(f"tokens {name}"), self.sums.get(f"means {name}")
        if tokens is None or mean is None:
            return None
        return tokens.flatten().double().div(mean).sqrt().float()

    def outputs(self, name: str) -> Float64[Tensor, " m"]:
        """f of a matrix."""
        return self.sums[f"outputs {name}"]
