"""KL(p || q) of the predictions of two models, chunk by chunk of positions."""

from jaxtyping import Float
from torch import Tensor

CHUNK = 4_000_000  # logits in float32 at a time: 16 MB, 80 positions of a vocabulary of 50,000


def kl_terms(
    p_logits: Float[Tensor, "*positions vocab"], q_logits: Float[Tensor, "*positions vocab"]
) -> Float[Tensor, "*positions vocab"]:
    """p(v) (log p(v) - log q(v)) in float32: their sum over the vocabulary is the KL, in nats."""
    # In float32: log p of some -10 has a spacing of 0.06 in bfloat16.
    log_p, log_q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    p = log_p.exp()
    # 0 log 0 = 0: tokens that a model excludes have log p = -inf, and 0 inf is NaN.
    return (p * (log_p - log_q)).masked_fill(p == 0, 0)
