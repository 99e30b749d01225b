"""Whether a .gguf file is read as the model and the tokenizer that it was written of."""

import math
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quip.errors import UnsupportedModel, shown
from quip.model.gguf.config import read_gguf_config
from quip.model.gguf.header import read_header
from quip.model.gguf.rope import CLOSE
from quip.model.gguf.tokenizer import complete_tokenizer
from quip.packed.checkpoint import read_tokenizer

REMEDY = "export it with --dense, for the converter of llama.cpp"
# Words of a config that change no logits.
SILENT = (
    *("architectures", "dtype", "model_type", "transformers_version", "quantization_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range"),
    *("attention_dropout", "pretraining_tp", "max_window_layers", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "return_dict", "output_hidden_states"),
)
SAMPLE = """The quick brown fox, aged 12 years and 345 days, doesn't
\tjump; it's   RESTING...  12,345.67 \u00e9t\u00e9 na\u00efve \u4f60\u597d \U0001f600!?

 def f(x): return x**2  # \u00df \u041f\u0440\u0438\u0432\u0435\u0442"""


def check_returned(
    path: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise UnsupportedModel, with what differs, unless the file says the same of both."""
    read = read_gguf_config(path.name, path)
    found = read.to_dict()
    said, known = config.to_dict(), {field.name for field in fields(config)}
    # What else a config.json says its class has no use for, and no GGUF file a word.
    for key in sorted(known & said.keys()):
        value, other = said[key], found.get(key)
        if key == "rope_parameters":
            same = _turns_alike(config, read)
        else:
            same = key in SILENT or _plain(value) == _plain(other)
        if not same:
            raise UnsupportedModel(
                f"its config says {key}: {shown(value)}, and a GGUF file would be read as "
                f"{shown(other)}; {REMEDY}"
            )
    returned = read_tokenizer(str(path.parent), gguf_file=path.name)
    complete_tokenizer(returned, read_header(path.name, path))
    for text in (SAMPLE, *SAMPLE.split()):
        ours, theirs = (x(text)["input_ids"] for x in (tokenizer, returned))
        if ours != theirs:
            raise UnsupportedModel(
                f"its tokenizer makes {shown(ours)} of {text!r}, and that of a GGUF file "
                f"{shown(theirs)}; {REMEDY}"
            )


def _turns_alike(config: PretrainedConfig, other: PretrainedConfig) -> bool:
    """Whether two configs turn by the same angles: there are several words for some."""
    kind: Any = LlamaRotaryEmbedding  # as the other kinds that are written have it
    ours, theirs = kind(config), kind(other)
    frequencies = torch.allclose(ours.inv_freq, theirs.inv_freq, rtol=CLOSE, atol=0)
    return frequencies and math.isclose(
        ours.attention_scaling, theirs.attention_scaling, rel_tol=CLOSE
    )


def _plain(value: Any) -> Any:
    """A value with its numbers as float32, which GGUF has them in, and nothing for "no"."""
    if isinstance(value, dict):
        return {key: plain for key, x in value.items() if (plain := _plain(x)) is not None}
    if isinstance(value, float):
        return struct.unpack("f", struct.pack("f", value))[0]
    return None if value is False else value
