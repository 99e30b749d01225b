"""The gradient of the loss at the logits of a window, for labels of the data or of the model."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from quip.matrix.seeds import rng_for

SCALE = 2.0**10  # of the loss: gradients in half precision underflow less, others stay as they are
CHUNK = 4_000_000  # probabilities in float64 at a time: 32 MB
KINDS = ("fisher", "labels")  # drawn from what the model predicts; the next tokens of the data


def gradient_at_logits(
    logits: Float[Tensor, "seqlen vocab"],
    ids: Int[Tensor, " seqlen"],
    *,
    kind: str,
    rng: torch.Generator,
) -> Float[Tensor, "seqlen vocab"]:
    """SCALE (softmax(z_t) - e_y), y the label of position t; zeros at the last, which has none.

    That is the gradient of SCALE times the sum of the cross entropies over the positions, in nats.
    """
    found = torch.zeros_like(logits)
    uniform = torch.rand(len(logits) - 1, generator=rng, dtype=torch.float64).to(logits.device)
    size = max(1, CHUNK // logits.shape[-1])
    for lo in range(0, len(logits) - 1, size):
        at = slice(lo, min(lo + size, len(logits) - 1))
        p = logits[at].double().softmax(-1)
        labels = sample(p, uniform[at]) if kind == "fisher" else ids[at.start + 1 : at.stop + 1]
        p.scatter_add_(1, labels[:, None], -torch.ones_like(p[:, :1]))
        found[at] = SCALE * p
    return found


def sample(
    p: Float64[Tensor, "positions vocab"], uniform: Float64[Tensor, " positions"]
) -> Int[Tensor, " positions"]:
    """The token of each position whose part of [0, 1), as long as its probability, holds u."""
    ends = p.cumsum(-1)
    u = uniform[:, None] * ends[:, -1:]  # their sum is 1 but for rounding
    return torch.searchsorted(ends, u, right=True)[:, 0].clamp_max(p.shape[-1] - 1)


def rng_of_window(seed: int, window: int) -> torch.Generator:
    """What draws the labels of a window: the same whichever windows pass with it, and where."""
    return rng_for(seed, f"labels of window {window}")
