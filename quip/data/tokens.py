"""Windows of tokens, drawn as GPTQ's published data loaders draw them (QuIP kept them).

Calibration takes random windows, evaluation consecutive ones. `random.Random(seed)` gives the
stream that the published `random.seed(seed)` gives, without touching the global one.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quip.errors import UsageError

# About one C4 document in forty is longer than 2048 tokens; without a bound a corpus
# that has none would be searched for ever.
DRAWS = 10_000
# Kinds of tokenizers whose models are lost on a window that does not begin with BOS: perplexity of
# Gemma 3 270M is 276 without, 49 with it. No published window of other models begins so.
BEGUN = ("Gemma",)


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Equally long windows of tokens, and everything that says which tokens they are."""

    ids: Int64[Tensor, "count seqlen"]
    dataset: str
    split: str
    join: str | None  # between documents; None: every window lies within one document
    of: int | None = None  # the windows that the protocol has, of which these are the first

    @property
    def seqlen(self) -> int:
        return self.ids.shape[1]

    @property
    def sha256(self) -> str:
        """The hash, in hex, of the ids as little-endian 64-bit integers, row after row."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def stamp(self) -> dict[str, Any]:
        """What a perplexity depends on, beside the model."""
        return {
            "dataset": self.dataset,
            "split": self.split,
            "join": self.join,
            "windows": len(self.ids),
            "seqlen": self.seqlen,
            "sha256": self.sha256,
        }


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Int64[Tensor, " tokens"]:
    """The tokens of a whole text, with the special tokens that the tokenizer itself adds."""
    # verbose=False: a text longer than the model's positions is what we want, not a mistake.
    return torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)


def begun(
    ids: Int64[Tensor, "count seqlen"], tokenizer: PreTrainedTokenizerBase
) -> Int64[Tensor, "count seqlen"]:
    """The windows, with BOS in place of the first token of each where a model needs that."""
    bos = tokenizer.bos_token_id
    if bos is None or not type(tokenizer).__name__.startswith(BEGUN):
        return ids
    return torch.cat([torch.full_like(ids[:, :1], int(bos)), ids[:, 1:]], dim=1)


def random_windows(
    ids: Int64[Tensor, " tokens"], *, count: int, seqlen: int, rng: random.Random, name: str
) -> Int64[Tensor, "count seqlen"]:
    """Windows anywhere in one text of at least so many tokens; two of them may overlap."""
    if len(ids) <= seqlen:
        raise UsageError(
            f"{name}: {len(ids)} tokens, but windows of {seqlen} need at least {seqlen + 1}; "
            "lower --seqlen or give more text"
        )
    if len(ids) < count * seqlen:
        raise UsageError(
            f"{name}: {len(ids)} tokens, but {count} windows of {seqlen} ask for {count * seqlen}; "
            f"lower --nsamples to {len(ids) // seqlen} or less, lower --seqlen, or give more text"
        )
    return torch.stack([_window(ids, seqlen, rng) for _ in range(count)])


def document_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    seqlen: int,
    rng: random.Random,
    name: str,
) -> Int64[Tensor, "count seqlen"]:
    """Each window from a random document that is longer than the window.

    The published code also accepts a document exactly as long, and then dies in `randint(0, -1)`;
    wherever it lives, the tokens are the same.
    """

    def draw() -> Int64[Tensor, " seqlen"]:
        for _ in range(DRAWS):
            ids = encode(tokenizer, documents[rng.randint(0, len(documents) - 1)])
            if len(ids) > seqlen:
                return _window(ids, seqlen, rng)
        raise UsageError(
            f"{name}: none of {DRAWS} documents drawn is longer than {seqlen} tokens; "
            "lower --seqlen or use a data set of longer documents"
        )

    return torch.stack([draw() for _ in range(count)])


def consecutive_windows(
    ids: Int64[Tensor, " tokens"], *, limit: int, seqlen: int, name: str
) -> Int64[Tensor, "count seqlen"]:
    """Windows side by side from the start, at most `limit`; the incomplete last one is dropped."""
    if len(ids) < seqlen:
        raise UsageError(
            f"{name}: {len(ids)} tokens are less than one window of {seqlen}; "
            "lower --seqlen or give more text"
        )
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)[:limit]


def _window(
    ids: Int64[Tensor, " tokens"], seqlen: int, rng: random.Random
) -> Int64[Tensor, " seqlen"]:
    # One start less than fits: the published range, kept so that the stream stays in step.
    start = rng.randint(0, len(ids) - seqlen - 1)
    return ids[start : start + seqlen]
