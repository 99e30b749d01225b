"""A folder in the layout of EXL3 as a checkpoint of ours, every code and every scale as it was.

Headers are compared with what config.json promises before anything is converted. A power of two
goes from suh, which holds the size of the weights, to the scale of the code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from quip.errors import QuipError, Unavailable, UnsupportedModel, shown
from quip.kernels.bits import pack
from quip.packed.checkpoint import save_checkpoint, skeleton
from quip.packed.exl3.codes import balanced, unpack_codes, unpack_signs
from quip.packed.exl3.format import (
    METHOD,
    UNMARKED,
    VECTORS,
    Matrix,
    check_marker,
    matrices,
)
from quip.packed.files import DAMAGED, TensorEntry, weight_bytes
from quip.packed.layout import Layout
from quip.packed.linear import quantized_layers
from quip.packed.published import (
    FLOAT,
    Slot,
    check_held,
    check_out,
    generation_of,
    headers,
    model_config,
    read_words,
    tokenizer_of,
)

HEAD = "lm_head."


class Words(TypedDict):
    """What has to be known of a config.json before transformers reads it."""

    quantization_config: NotRequired[dict[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was taken in."""

    matrices: int
    codes: tuple[str, ...]
    bits: float  # per weight of the matrices, codes alone
    file_bytes: int  # of the checkpoint's weights


def import_exl3(
    folder: str | Path, out: str | Path, *, tokenizer: str | None = None, overwrite: bool = False
) -> Imported:
    """Write the model of `folder`, in the layout of EXL3, to `out` as our checkpoint.

    The tokenizer is that of the folder, or `tokenizer`, a hub id or another folder. The checkpoint
    computes in the type of the embedding unless asked otherwise.

    Raises UsageError for an `out` that cannot be, UnsupportedModel for a model or a variant of the
    layout that cannot be read, and Unavailable for files that are missing, damaged or do not fit.
    """
    folder, out = Path(folder), Path(out)
    check_out(folder, out, overwrite=overwrite)
    try:
        config = _config(folder)
        held = headers(folder)
        model = _skeleton(config, tied=not any(name.startswith(HEAD) for name in held))
        found = matrices(model, held)
        Layout({matrix.name: matrix.spec for matrix in found}).make_room(model)
        check_held(held, _wanted(model, found))
        words = tokenizer_of(str(folder) if tokenizer is None else tokenizer)
        texts = generation_of(folder)
        _fill(model, found, held)
    except QuipError as error:
        raise type(error)(f"{folder}: {error}") from error
    save_checkpoint(model, words, out, texts=texts, overwrite=overwrite)
    weights = sum(matrix.m * matrix.n for matrix in found)
    return Imported(
        matrices=len(found),
        codes=tuple(sorted({matrix.code for matrix in found})),
        bits=sum(matrix.bits * matrix.m * matrix.n for matrix in found) / weights,
        file_bytes=weight_bytes(out),
    )


def _config(folder: Path) -> PretrainedConfig:
    """The model's config without what it says of EXL3."""
    words = read_words(folder, Words).get("quantization_config")
    if words is None or words.get("quant_method") != METHOD:
        method = shown(words.get("quant_method")) if words else "nothing"
        raise UnsupportedModel(
            f"its config.json says that it was quantized by {method}, and {METHOD} can be read; "
            "name the folder of a model that exllamav3 converted"
        )
    config = model_config(folder)
    del config.quantization_config
    return config


def _skeleton(config: PretrainedConfig, *, tied: bool) -> PreTrainedModel:
    """The model as transformers makes it, on the meta device."""
    # What the files have is used: an lm_head of its own is one, whatever config.json says.
    for part in () if tied else (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return skeleton(config).eval().requires_grad_(False)


def _wanted(model: PreTrainedModel, found: Sequence[Matrix]) -> dict[str, Slot]:
    """Every tensor that the files have to hold."""
    wanted = {key: slot for matrix in found for key, slot in matrix.slots.items()}
    names = {f"{matrix.name}." for matrix in found}
    for key, x in model.state_dict().items():
        packed = key[: key.rfind(".") + 1] in names
        if not packed and key not in model.all_tied_weights_keys:
            wanted[key] = Slot(tuple(x.shape), FLOAT)
    return wanted


def _fill(model: PreTrainedModel, found: Sequence[Matrix], held: Mapping[str, TensorEntry]) -> None:
    """Give the model the tensors of the files."""
    state = {key: held[key].read() for key in model.state_dict() if key in held}
    for matrix in found:
        state |= _tensors(matrix, held)
    state |= {key: state[source] for key, source in model.all_tied_weights_keys.items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    for name, layer in quantized_layers(model).items():
        try:
            layer.check()
        except QuipError as error:
            raise Unavailable(f"{name}: {error}; {DAMAGED}") from error


def _tensors(matrix: Matrix, held: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """The tensors of one matrix by the names of our checkpoints, but for its bias."""

    def read(key: str) -> Tensor:
        return held[f"{matrix.name}.{key}"].read()

    if matrix.code != UNMARKED:
        check_marker(matrix.name, int(read(matrix.code)), matrix.code)
    vectors = {
        ours: unpack_signs(read(theirs[:-1])) if theirs in matrix.packed else read(theirs)
        for theirs, ours in VECTORS.items()
    }
    scale, vectors["signs_in"] = balanced(vectors["signs_in"])
    codes = pack(unpack_codes(read("trellis")), matrix.bits)
    tensors = {"codes": codes, "scale": torch.tensor([scale]), **vectors}
    return {f"{matrix.name}.{key}": x for key, x in tensors.items()}
