"""A model of packed grids as a .gguf file, every number as it is."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quip.packed.gguf.tensors import TYPES, Planned, architecture_of, plan_tensors
from quip.packed.gguf.vocabulary import vocabulary_of
from quip.packed.gguf.words import FREE, divisors_of, words_of

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8}  # what llama.cpp calls such a file


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, name: str
) -> dict[str, int]:
    """Write the file; the number of packed matrices of each kind of blocks.

    One tensor at a time is made. Raises UnsupportedModel for a model or a tokenizer that GGUF has
    no words for, and UsageError for a packed matrix that no blocks hold exactly.
    """
    import gguf  # of the extra of this name

    architecture, tensors = architecture_of(model), plan_tensors(model)
    kinds = Counter(x.kind for x in tensors if x.kind not in TYPES)
    words = {"general.type": "model", "general.name": name, "general.quantization_version": 2}
    words["general.file_type"] = FILE_TYPES[kinds.most_common(1)[0][0]]
    words |= {f"{architecture}.{key}": x for key, x in words_of(model).items()}
    embedding: Any = model.get_input_embeddings()
    words |= vocabulary_of(tokenizer, embedding.weight.shape[0])
    if (divisors := divisors_of(model)) is not None:
        tensors = [*tensors, Planned(FREE, "F32", tuple(divisors.shape), divisors.float)]
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in words.items():
            _add(writer, key, value)
        for x in tensors:
            kind = gguf.GGMLQuantizationType[x.kind]
            writer.add_tensor_info(x.name, _shape(x), np.dtype("uint8"), x.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for x in tensors:
            writer.write_tensor_data(_bytes(x.make()))
    finally:
        writer.close()
    return dict(kinds)


def _shape(x: Planned) -> tuple[int, ...]:
    """In bytes, as the writer takes all that are not numbers of numpy."""
    *rows, count = x.shape
    return (*rows, count * (TYPES[x.kind].itemsize if x.kind in TYPES else 1))


def _bytes(x: Tensor) -> np.ndarray:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy()


def _add(writer: Any, key: str, value: Any) -> None:
    kinds: Mapping[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)
