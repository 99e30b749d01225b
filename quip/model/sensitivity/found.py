"""What was felt, of all processes together: the weights of tokens, and what outputs feel."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What the loss of a model feels of its matrices, and of its tokens.

    `windows` have an axis of windows first, of all of them or of those of one process:

        tokens INPUT        s_t = |g_t|^2 of each token, summed over the matrices that it feeds
        sent EXPERTS        the experts that the router sent a token to
        slots EXPERTS.PART  s_t of this matrix of each of those

    and `sums` are of all tokens, in nats and per token:

        means INPUT         the mean of s_t
        means EXPERTS.PART  of each expert, over the tokens it was sent; and last, over all tokens
        outputs MATRIX      f_i = E[|x_t|^2 g_ti^2] of each output
        squares MATRIX      E[|g_t|^2]
    """

    kind: str
    windows: Mapping[str, Shaped[Tensor, "_count seqlen *slots"]]
    sums: Mapping[str, Float64[Tensor, "..."]]

    def roots(self, name: str) -> Float32[Tensor, " tokens"] | None:
        """sqrt(s_t / mean s) of each token of an input; None: all tokens weigh the same."""
        tokens = self.windows.get(f"tokens {name}")
        if tokens is None:
            return None
        return _relative(tokens.flatten(), self.sums[f"means {name}"]).sqrt().float()

    def sent(self, name: str) -> "Sent | None":
        """The weights of the tokens of a module of experts; None: all tokens weigh the same."""
        chosen = self.windows.get(f"sent {name}")
        if chosen is None:
            return None
        start = f"slots {name}."
        slots = {x.removeprefix(start): x for x in self.windows if x.startswith(start)}
        return Sent(
            chosen.flatten(0, 1),
            {part: self.windows[key].flatten(0, 1) for part, key in slots.items()},
            {part: self.sums[f"means {name}.{part}"] for part in slots},
        )

    def outputs(self, matrices: Iterable[str]) -> dict[str, Float64[Tensor, " m"]]:
        """f of each matrix."""
        return {name: self.sums[f"outputs {name}"] for name in matrices}

    def squares(self, matrices: Iterable[str]) -> dict[str, Float64[Tensor, ""]]:
        """E[|g_t|^2] of each matrix."""
        return {name: self.sums[f"squares {name}"] for name in matrices}


@dataclass(frozen=True)
class Sent:
    """The weights of the tokens of a module of experts, at each expert that a token was sent to."""

    chosen: Int[Tensor, "tokens k"]  # these experts
    slots: Mapping[str, Float32[Tensor, "tokens k"]]  # of each matrix of an expert
    means: Mapping[str, Float64[Tensor, " experts"]]  # the mean of each expert's, and of tokens'

    def roots(
        self, part: str, expert: int | None, rows: Int[Tensor, " rows"]
    ) -> Float32[Tensor, " rows"]:
        """sqrt(s_t / mean s) of these tokens at a matrix of an expert; None: at all of them.

        A token that the router sends there only since blocks before have changed has the weight 1.
        """
        rows = rows.to(self.chosen.device)
        s, means = self.slots[part][rows], self.means[part]
        if expert is None:
            return _relative(s.sum(-1), means[-1]).sqrt().float()
        own = self.chosen[rows] == expert
        found = _relative((s * own).sum(-1), means[expert])
        return found.where(own.any(-1), 1).sqrt().float()


def _relative(s: Float32[Tensor, " tokens"], mean: Float64[Tensor, ""]) -> Tensor:
    """The weights over their mean; where that is 0, all weigh the same."""
    return torch.where(mean > 0, s.double() / mean, 1)
