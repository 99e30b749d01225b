"""A causal language model and its tokenizer: by hub id, local folder, .gguf file, or `demo`.

Files that are damaged, or not what their name says, make the loaders underneath raise anything
(tokenizers and struct among them raise no common class), so whatever a loader raises becomes
one line about the file here, with the original as its cause.
"""

import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quip.errors import Unavailable, UnsupportedModel, UsageError, shown
from quip.model.gguf.config import read_gguf_config
from quip.model.gguf.header import read_header
from quip.model.gguf.once import parsed_once
from quip.model.gguf.tokenizer import complete_tokenizer
from quip.model.load_streamed import folder_to_stream, load_streamed
from quip.model.located import Source, locate
from quip.model.stream import Stream
from quip.model.vocabulary import check_rows
from quip.packed.checkpoint import positions, read_model, read_tokenizer
from quip.packed.checks import check_counts
from quip.packed.experts import unfuse
from quip.packed.hub import METHOD

DTYPES = {
    "auto": torch.float32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode, without gradients, in host memory or but for its blocks."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    max_length: int  # the model's positions; sys.maxsize where its attention has no limit
    stream: Stream | None = None  # where its blocks are read from; None: they are in memory

    @property
    def dtype_name(self) -> str:
        """What it computes in, as flags name it."""
        return str(self.model.dtype).removeprefix("torch.")


def load_model(
    name: str, *, dtype: str = "auto", seqlen: int | None = None, stream: str = "off"
) -> LoadedModel:
    """The model called `name`, every weight of it read from the checkpoint.

    `name` is a hub id, a folder written by save_pretrained, a .gguf file (dequantized while
    loading), `demo`, the small model inside this package, or a checkpoint that quip saved, whose
    matrices stay packed. `dtype` is float32, bfloat16 or float16; auto means float32, whatever the
    files hold (nothing is cast to a narrower type unasked), and for a checkpoint of quip what the
    run computed in that saved it. A `seqlen` is checked against the model's positions before
    weights are read. With `stream` on, or auto for a model above a quarter of the free memory,
    its blocks stay in their files.

    Raises Unavailable (not found, unreachable, damaged), UnsupportedModel (no causal language
    model that transformers itself knows) or UsageError (dtype, seqlen).
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {shown(dtype)}; choose from {', '.join(DTYPES)}")
    source = locate(name)
    with parsed_once() if source.gguf else nullcontext():
        return _load(name, source, dtype, seqlen, stream)


def _load(name: str, source: Source, dtype: str, seqlen: int | None, stream: str) -> LoadedModel:
    config = _config(name, source)
    _check_causal(name, config)
    max_length = positions(config) or sys.maxsize
    if seqlen is not None:
        check_seqlen(name, max_length, seqlen)
    tokenizer = _tokenizer(name, source)
    own: Any = config.dtype if dtype == "auto" and _quantized_by(config) else None
    model, blocks = _weights(name, source, config, own or DTYPES[dtype], stream)
    check_rows(name, model, tokenizer)
    unfuse(model)
    return LoadedModel(
        model=model, tokenizer=tokenizer, name=name, max_length=max_length, stream=blocks
    )


def read_config(name: str) -> PretrainedConfig:
    """The config alone, of a model named as `load_model` takes it."""
    return _config(name, locate(name))


def check_seqlen(name: str, max_length: int, seqlen: int) -> None:
    """Raise UsageError unless windows of seqlen tokens fit the model and hold a prediction."""
    if seqlen < 2:
        raise UsageError(f"seqlen {seqlen}: a window needs at least 2 tokens to predict one")
    if seqlen > max_length:
        raise UsageError(
            f"seqlen {seqlen} is above the {max_length} positions of {name}; "
            f"choose at most {max_length}"
        )


def _config(name: str, source: Source) -> PretrainedConfig:
    if source.gguf is not None:
        return read_gguf_config(name, Path(source.where) / source.gguf)
    try:
        return AutoConfig.from_pretrained(source.where, **source.keywords)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModel(
                f"{name} needs Python code from its own repository, which is never run here; "
                "choose a model that transformers supports by itself"
            ) from error
        if "model type" in str(error) or "model_type" in str(error):
            raise UnsupportedModel(f"{name}: {_reason(error)}") from error
        if Path(source.where).is_dir():
            raise Unavailable(f"{name}: {_reason(error)}; repair the files there") from error
        raise Unavailable(
            f"{name} is no local folder, and as a hub id: {_reason(error)}; give the id of a model "
            "that can be reached or is cached, a folder, a .gguf file, or `demo`"
        ) from error


def _check_causal(name: str, config: PretrainedConfig) -> None:
    try:
        check_counts(config)
    except Unavailable as error:
        raise Unavailable(f"{name}: {error}") from error
    made = config.architectures or []
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder; give a decoder-only model")
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    # BERT and its kin can be loaded as decoders, but were trained to see the future.
    causal = not made or any(re.search("CausalLM|LMHead|ForConditionalGen|Model$", x) for x in made)
    if not known or not causal:
        kind = (", ".join(map(str, made)) or str(config.model_type))[:200]
        raise UnsupportedModel(
            f"{name} is a {kind}, not a causal language model; "
            "give a model that predicts the next token"
        )
    method = _quantized_by(config)
    if method not in (None, METHOD):
        raise UnsupportedModel(
            f"{name} is quantized already ({str(method)[:200]}); give the original"
        )


def _quantized_by(config: PretrainedConfig) -> str | None:
    words = getattr(config, "quantization_config", None)
    if not words:
        return None
    return words.get("quant_method", "method unknown") if isinstance(words, dict) else "unknown"


def _tokenizer(name: str, source: Source) -> PreTrainedTokenizerBase:
    remedy = "add the tokenizer's files (tokenizer.json) to the model's"
    try:
        tokenizer = read_tokenizer(source.where, gguf_file=source.gguf)
        if source.gguf is not None:
            path = Path(source.where) / source.gguf
            complete_tokenizer(tokenizer, read_header(name, path))
        return tokenizer
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{name}: {error}; give its original folder or hub id") from error
    except Exception as error:
        raise Unavailable(f"{name}: no usable tokenizer: {_reason(error)}; {remedy}") from error


def _weights(
    name: str, source: Source, config: PretrainedConfig, dtype: torch.dtype, mode: str
) -> tuple[PreTrainedModel, Stream | None]:
    def damage(error: Exception) -> str:
        return f"its weights cannot be read: {_reason(error)}; download it again, or save it anew"

    where = source.gguf or source.where
    if folder := folder_to_stream(name, where, config, dtype, mode):
        return load_streamed(name, source.where, folder, config, dtype, damage)
    keywords = source.keywords
    if source.gguf is not None:
        keywords["quantization_config"] = GgufConfig(dequantize=True)
    keywords["ignore_mismatched_sizes"] = True  # for refuse_gaps, which names them
    return read_model(name, source.where, damage, config=config, dtype=dtype, **keywords), None


def _reason(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (line if len(line) < 200 else line.split(". ")[0][:200]).rstrip(".")
