"""What a .gguf file says of its tokenizer and transformers passes over.

A file names its way of splitting text, and llama.cpp knows what the name means: the regular
expressions, whether whole words come before merges, whether a first token is added. transformers
has some of the expressions and splits as GPT-2 does where it knows no name.
"""

from typing import Any

from tokenizers import Regex, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from quip.errors import UnsupportedModel, shown
from quip.model.gguf.header import Header
from quip.packed.gguf.splits import SPLITS, WHOLE


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, header: Header) -> None:
    """Make transformers' tokenizer of a file split as the file says, in place.

    Raises UnsupportedModel for a way of splitting that is not known by its name.
    """
    said = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in header.words.items()
        if key.startswith("tokenizer.ggml.")
    }
    backend: Any = tokenizer
    if said.get("model") == "gpt2":
        _split(backend, said)
    elif said.get("model") == "llama" and said.get("add_space_prefix") is False:
        _without_prefix(backend)


def _split(tokenizer: Any, said: dict[str, Any]) -> None:
    name = said.get("pre")
    if name in SPLITS:
        cuts = [pre_tokenizers.Split(Regex(x), behavior="isolated") for x in SPLITS[name]]
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, plain])
    elif name is not None and name not in GGUF_PRE_TOKENIZER_SPLITS:
        raise UnsupportedModel(
            f"its text is split in a way called {shown(name)} (tokenizer.ggml.pre), which is not "
            "known here"
        )
    if name in WHOLE:
        tokenizer.backend_tokenizer.model.ignore_merges = True
        if "add_bos_token" not in said and tokenizer.bos_token is not None:
            tokenizer.add_bos_token = True


def _without_prefix(tokenizer: Any) -> None:
    """No space in front of the first word, which SentencePiece adds unless a file says no."""
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
