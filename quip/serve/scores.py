"""Logarithms of probabilities, of tokens and of the likeliest ones in their place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quip.errors import NonFinite

ROWS = 256  # at once: what a softmax over a large vocabulary takes


@dataclass(frozen=True)
class Scored:
    """A token, log p of it after those before it, and the likeliest in its place, by log p.

    p is what the model says, before any temperature. The first token of a prompt has none.
    """

    text: str
    log_p: float | None
    width: int = 0  # of it in the text, in characters: special tokens are not part of that
    top: tuple[tuple[str, float], ...] = ()


def score(
    tokenizer: PreTrainedTokenizerBase,
    logits: Float[Tensor, "s vocab"],
    tokens: Sequence[int],
    top: int,
) -> list[Scored]:
    """The tokens that stand where the rows of `logits` predict one, with `top` others of each.

    Raises NonFinite where the model predicts NaN.
    """
    found: list[Scored] = []
    for start in range(0, len(tokens), ROWS):
        part = torch.tensor(tokens[start : start + ROWS], device=logits.device)
        log_p = logits[start : start + ROWS].float().log_softmax(-1)
        own = log_p.gather(1, part[:, None])[:, 0].tolist()
        likely = log_p.topk(top, dim=1)
        rows = zip(part.tolist(), own, likely.indices.tolist(), likely.values.tolist(), strict=True)
        for token, value, others, values in rows:
            if value != value:
                raise NonFinite("the model predicts NaN; choose another --dtype")
            texts = [str(tokenizer.decode([other])) for other in others]
            found.append(named(tokenizer, token, value, tuple(zip(texts, values, strict=True))))
    return found


def named(
    tokenizer: PreTrainedTokenizerBase,
    token: int,
    log_p: float | None = None,
    top: tuple[tuple[str, float], ...] = (),
) -> Scored:
    """What is known of a token, by its text."""
    text = str(tokenizer.decode([token]))
    return Scored(text, log_p, 0 if token in tokenizer.all_special_ids else len(text), top)
