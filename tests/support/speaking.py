"""Tokenizers whose characters take several tokens, and models that say what they are told to."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support.tiny import VOCAB

END = "<end>"  # the stop token, number 0
BYTES = [chr(x) for x in (*range(33, 127), *range(161, 173), *range(174, 256))]
BYTES += [chr(256 + x) for x in range(256 - len(BYTES))]  # how byte-level BPE writes bytes
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and 'Swedish' in message.content %}"
    "{{ raise_exception('no Swedish') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]>{% endif %}"
)


def numbers(end: int | None = None) -> PreTrainedTokenizerFast:
    """Of tiny models: tokens are written as their numbers. `end` is the stop token, if any."""
    vocab = {str(i): i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=None if end is None else str(end)
    )


def byte_level(template: str | None = None) -> PreTrainedTokenizerFast:
    """A token a byte, after the stop token; but `an` is one token, and so is a byte that ends a
    character together with one that begins another."""
    across = "©â"  # the second byte of é, and the first of many others
    vocab = {token: i for i, token in enumerate([END, *BYTES, "an", across])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "n"), ("©", "â")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, template)


def spaced() -> PreTrainedTokenizerFast:
    """As Llama's: words begin with a space, the first one's is not written, bytes for the rest."""
    words = [END, "<unk>", "▁", "a", "b", "c", "▁a", "▁b", *(f"<0x{x:02X}>" for x in range(256))]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(words)},
            merges=[("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _fast(tokenizer, None)


def _fast(tokenizer: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([END])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = template
    return fast


def saying(ids: Sequence[int], *, vocab: int = 264, positions: int = 256) -> LlamaForCausalLM:
    """A model that follows each of these tokens with the next one, all others with token 0.

    Its block adds nothing to the embeddings, which are one-hot.
    """
    config = LlamaConfig(
        hidden_size=vocab,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=vocab,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab))
        model.lm_head.weight.zero_()
        for token, following in pairwise(ids):
            model.lm_head.weight[following, token] = 1
    return model


def save_speaker(
    folder: Path, text: str, *, template: str | None = TEMPLATE, loop: bool = False, **sizes: int
) -> str:
    """A model that goes on from the first byte of `text` to its last; then it stops or loops."""
    tokenizer = byte_level(template)
    ids = tokenizer(text)["input_ids"]
    assert len(set(ids)) == len(ids), "one successor each"
    saying([*ids, ids[0] if loop else 0], **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
