"""A tokenizer as the keys of a .gguf file: byte-level BPE, or SentencePiece's BPE."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from quip.errors import UnsupportedModel, shown
from quip.packed.gguf.splits import GPT2, SPLITS, WHOLE

NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # what a token is
UNREACHED = -1e6  # the score of a token that no merge makes
REMEDY = "export the model with --dense, for the converter of llama.cpp"


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """The keys `tokenizer.*`, of as many tokens as the embedding has rows.

    Raises UnsupportedModel for a tokenizer that GGUF has no words for.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model, cuts = backend["model"], _cuts(backend["pre_tokenizer"])
    if model["type"] != "BPE":
        raise UnsupportedModel(f"its tokenizer is of the type {model['type']}; {REMEDY}")
    if not model["merges"]:
        raise UnsupportedModel(
            f"its tokenizer merges nothing, for which GGUF has no word; {REMEDY}"
        )
    merges = [x if isinstance(x, list) else x.split(" ") for x in model["merges"]]
    tokens = tokenizer.convert_ids_to_tokens(list(range(rows)))
    tokens = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    words = {"ggml.tokens": tokens, "ggml.token_type": _kinds(tokenizer, tokens)}
    if model["byte_fallback"]:
        words |= {"ggml.model": "llama", "ggml.scores": _scores(tokens, merges)}
        words["ggml.add_space_prefix"] = tokenizer.tokenize("a")[0] != "a"
    else:
        words |= {"ggml.model": "gpt2", "ggml.merges": [" ".join(merge) for merge in merges]}
        words["ggml.pre"] = _name_of(cuts, whole=bool(model["ignore_merges"]))
    return {f"tokenizer.{key}": x for key, x in (words | _ends(tokenizer, rows)).items()}


def _ends(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """The tokens around a text, and which of them are added."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    # A tokenizer may know a token that the model has no embedding of, and never meets.
    here = {name: x for name, x in ids.items() if x is not None and x < rows}
    words: dict[str, Any] = {f"ggml.{names[name]}_token_id": x for name, x in here.items()}
    around = tokenizer("a")["input_ids"]
    words["ggml.add_bos_token"] = around[0] == here.get("bos", -1)
    words["ggml.add_eos_token"] = around[-1] == here.get("eos", -1)
    if isinstance(tokenizer.chat_template, str):
        words["chat_template"] = tokenizer.chat_template
    return words


def _kinds(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    added = tokenizer.added_tokens_decoder
    known = tokenizer.get_vocab().keys()

    def kind(i: int, token: str) -> int:
        if token not in known:
            return UNUSED
        if token == tokenizer.unk_token and i not in added:
            return UNKNOWN
        if i in added:
            return CONTROL if added[i].special else DEFINED
        return BYTE if len(token) == 6 and token.startswith("<0x") else NORMAL

    return [kind(i, token) for i, token in enumerate(tokens)]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores by which the pairs that were merged first are merged first."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else UNREACHED for token in tokens]


def _name_of(cuts: tuple[str, ...] | None, *, whole: bool) -> str:
    """What GGUF calls a way of splitting text."""
    known: Mapping[str, Any] = {k: (x,) for k, x in GGUF_PRE_TOKENIZER_SPLITS.items()} | SPLITS
    for name, expressions in known.items():
        if cuts == tuple(expressions) and whole == (name in WHOLE):
            return name
    raise UnsupportedModel(
        f"its tokenizer splits text in a way that GGUF has no name for ({shown(cuts)}); {REMEDY}"
    )


def _cuts(splitting: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The expressions that cut one after the other; None where they are no expressions."""
    found = list(_each(splitting))
    return None if None in found else tuple(x for x in found if x)


def _each(splitting: dict[str, Any] | None) -> Iterator[str | None]:
    match splitting:
        case {"type": "Sequence", "pretokenizers": parts}:
            for part in parts:
                yield from _each(part)
        case {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}:
            yield cut
        case {"type": "Digits", "individual_digits": True}:
            yield r"\p{N}"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": by_itself}:
            yield GPT2 if by_itself else ""
        case _:
            yield None
