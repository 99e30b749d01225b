"""Tokens to calibrate and evaluate with: named data sets as published, or files."""

import random
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from quip.data.local import local_part
from quip.data.sources import SOURCES
from quip.data.tokens import (
    TokenSet,
    begun,
    consecutive_windows,
    document_windows,
    encode,
    random_windows,
)
from quip.errors import UsageError, shown

__all__ = ["DATASETS", "TokenSet", "calibration_tokens", "check_dataset", "evaluation_tokens"]

DATASETS = tuple(SOURCES)


def calibration_tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, *, nsamples: int, seqlen: int, seed: int
) -> TokenSet:
    """`nsamples` random windows of a data set's calibration split.

    `name` is one of `DATASETS`, a .txt, .json, .jsonl or .parquet file, or a folder of such files.
    Windows of Gemma begin with BOS, in place of their first token.
    """
    _require_positive(nsamples=nsamples, seqlen=seqlen)
    part = SOURCES[name].calibration if name in SOURCES else local_part(_path(name), "train")
    documents, rng = part.load(part.split), random.Random(seed)
    if part.join is None:
        ids = document_windows(
            documents, tokenizer, count=nsamples, seqlen=seqlen, rng=rng, name=name
        )
    else:
        text = encode(tokenizer, part.join.join(documents))
        ids = random_windows(text, count=nsamples, seqlen=seqlen, rng=rng, name=name)
    return TokenSet(begun(ids, tokenizer), name, part.split, part.join)


def evaluation_tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, *, seqlen: int, nsamples: int | None = None
) -> TokenSet:
    """The windows that published perplexities are taken over; at most `nsamples`, the first ones.

    The names are those of `calibration_tokens`.
    """
    _require_positive(nsamples=nsamples, seqlen=seqlen)
    part = SOURCES[name].evaluation if name in SOURCES else local_part(_path(name), "test")
    documents = part.load(part.split)
    count, whole = min(part.windows, nsamples or part.windows), part.windows
    if part.join is None:
        rng = random.Random(0)  # published: the same windows whatever the run's own seed
        ids = document_windows(documents, tokenizer, count=count, seqlen=seqlen, rng=rng, name=name)
    else:
        text = encode(tokenizer, part.join.join(documents[: part.documents]))
        ids = consecutive_windows(text, limit=count, seqlen=seqlen, name=name)
        whole = min(whole, len(text) // seqlen)
    return TokenSet(begun(ids, tokenizer), name, part.split, part.join, of=whole)


def check_dataset(name: str, use: Literal["calibration", "evaluation"]) -> None:
    """Raise what would be raised later for a name that is no data set, or a file without texts.

    Local files are read, which takes no time beside a model; nothing is downloaded.
    """
    if name not in SOURCES:
        part = local_part(_path(name), "train" if use == "calibration" else "test")
        part.load(part.split)


def _path(name: str) -> Path:
    path = Path(name).expanduser()
    try:
        path.stat()
    except (OSError, ValueError) as error:  # too long, say, or a link to itself
        raise UsageError(
            f"unknown data set {shown(name)}: choose {', '.join(SOURCES)}, or a file or folder "
            f"(there is none of this name: {getattr(error, 'strerror', None) or error})"
        ) from error
    return path


def _require_positive(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UsageError(f"{name} is {size}; it must be at least 1")
