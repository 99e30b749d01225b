"""The tokenizer of every tiny model: one token a letter."""

from pathlib import Path

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.tiny import VOCAB

# The 64 entries of every tiny vocabulary, enough for bytes of plain lower case.
ENTRIES = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "T", *map(str, range(34))]
assert len(set(ENTRIES)) == VOCAB


def save_tokenizer(folder: Path) -> None:
    """Its files go to the folder."""
    model = models.BPE(vocab={entry: i for i, entry in enumerate(ENTRIES)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
