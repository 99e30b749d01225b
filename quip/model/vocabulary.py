"""What a model and its tokenizer must agree on: rows for its tokens, and one to start with."""

from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quip.errors import Unavailable, UsageError, shown
from quip.packed.embedding import QuantizedEmbedding


def check_rows(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise Unavailable where text gives tokens that the embedding has no row for.

    Tokens that were added, which only a text that spells them out gives, may lack one: many
    models are published so. They are refused when they come.
    """
    embedding: Any = model.get_input_embeddings()
    packed = isinstance(embedding, QuantizedEmbedding)
    rows = embedding.out_features if packed else int(embedding.weight.shape[0])
    added = {str(token) for token in tokenizer.get_added_vocab()} - set(tokenizer("").tokens())
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if lost := beyond.keys() - added:
        raise Unavailable(
            f"{name}: its tokenizer gives {len(lost)} tokens, such as {shown(min(lost))}, beyond "
            f"the {rows} rows of its embedding; get the tokenizer's files that belong to the model"
        )
    if beyond:
        embedding.register_forward_pre_hook(partial(_check_ids, name, rows))


def _check_ids(name: str, rows: int, _: Any, asked: tuple[Int[Tensor, "..."], ...]) -> None:
    if asked and (highest := int(asked[0].max())) >= rows:
        raise UsageError(
            f"{name}: the text holds a token, {highest}, that is beyond the {rows} rows of the "
            "embedding; take out of the text what spells a special token"
        )


def first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before an empty context. Raises UsageError where there is none."""
    for holder in (tokenizer, model.config):
        for key in ("bos_token_id", "eos_token_id"):
            if isinstance(token := getattr(holder, key, None), int):
                return token
    raise UsageError("neither tokenizer nor model names a first or last token; add bos_token")
