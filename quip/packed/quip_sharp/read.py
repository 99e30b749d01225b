"""A folder in the published layout of QuIP# as a checkpoint of ours, every number as it was.

Headers are compared with what config.json promises before anything is converted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from quip.codebooks import LATTICES
from quip.errors import QuipError, Unavailable, UnsupportedModel, UsageError
from quip.kernels.bits import pack
from quip.packed.checkpoint import save_checkpoint, skeleton
from quip.packed.files import DAMAGED, TensorEntry, weight_bytes
from quip.packed.published import (
    FLOAT,
    Slot,
    check_out,
    exactly,
    generation_of,
    headers,
    tokenizer_of,
)
from quip.packed.quip_sharp.codes import unpack_codes
from quip.packed.quip_sharp.format import (
    HEAD,
    IDS,
    Matrix,
    expected_layout,
    matrices,
    rescales,
)
from quip.packed.quip_sharp.headers import check, read_config
from quip.packed.spec import Spec

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was taken in."""

    codebook: str
    bits: int  # per weight, codes alone
    matrices: int  # as the model has them: q, k and v are three
    file_bytes: int  # of the checkpoint's weights


def import_quip_sharp(
    folder: str | Path, out: str | Path, *, tokenizer: str | None = None, overwrite: bool = False
) -> Imported:
    """Write the model of `folder`, in the published layout of QuIP#, to `out` as our checkpoint.

    The tokenizer is that of the folder, or `tokenizer`, a hub id or another folder. The checkpoint
    computes in the type of the embedding, float16 in published files, unless asked otherwise.

    Raises UsageError for an `out` that cannot be, UnsupportedModel for another architecture or
    variant of the layout, and Unavailable for files that are missing, damaged or do not fit.
    """
    folder, out = Path(folder), Path(out)
    check_out(folder, out, overwrite=overwrite)
    try:
        config, spec = read_config(folder)
        held = headers(folder)
        model = _skeleton(config, spec, tied=HEAD not in held)
        check(held, _wanted(model, spec))
        words = tokenizer_of(str(folder) if tokenizer is None else tokenizer)
        texts = generation_of(folder)
        _fill(model, spec, held)
    except QuipError as error:
        raise type(error)(f"{folder}: {error}") from error
    save_checkpoint(model, words, out, texts=texts, overwrite=overwrite)
    name = spec.codebook["name"]
    return Imported(
        codebook=name,
        bits=LATTICES[name].bits,
        matrices=sum(len(matrix.members) for matrix in matrices(model)),
        file_bytes=weight_bytes(out),
    )


def _skeleton(config: PretrainedConfig, spec: Spec, *, tied: bool) -> PreTrainedModel:
    """The model with room for its packed matrices, on the meta device."""
    # What the files have is used: an lm_head of its own is one, whatever config.json says.
    config.tie_word_embeddings = tied and config.tie_word_embeddings
    model = skeleton(config)
    expected_layout(spec, config.num_hidden_layers).make_room(model)
    return model.eval().requires_grad_(False)


def _wanted(model: PreTrainedModel, spec: Spec) -> dict[str, Slot]:
    """Every tensor that the files have to hold."""
    wanted: dict[str, Slot] = {}
    ours = {HEAD} if model.config.tie_word_embeddings else set()
    for matrix in matrices(model):
        ours |= matrix.keys
        try:
            slots = matrix.slots(spec)
        except UsageError as error:
            raise UnsupportedModel(f"{matrix.name}: {error}") from error
        wanted |= {f"{matrix.name}.{key}": slot for key, slot in slots.items()}
    rest = {key: x for key, x in model.state_dict().items() if key not in ours}
    return wanted | {key: Slot(tuple(x.shape), FLOAT) for key, x in rest.items()}


def _fill(model: PreTrainedModel, spec: Spec, held: Mapping[str, TensorEntry]) -> None:
    """Give the model the tensors of the files."""
    state = {key: held[key].read() for key in model.state_dict() if key in held}
    for matrix in matrices(model):
        state |= _tensors(matrix, spec, held)
    if model.config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    for matrix in matrices(model):
        try:
            matrix.layer.check()
        except QuipError as error:
            raise Unavailable(f"{matrix.name}: {error}; {DAMAGED}") from error


def _tensors(matrix: Matrix, spec: Spec, held: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """The tensors of one published matrix, by the names of our checkpoints."""

    def read(key: str) -> Tensor:
        return held[f"{matrix.name}.{key}"].read()

    name, layer = spec.codebook["name"], matrix.layer
    if (number := int(read("codebook_id"))) != IDS[name]:
        raise UnsupportedModel(
            f"{matrix.name} has codebook_id {number}, and that of {name} in config.json is "
            f"{IDS[name]}; name another folder"
        )
    bits = LATTICES[name].bits
    codes = unpack_codes(read("Qidxs"), layer.out_features, layer.in_features, bits)
    tensors = {
        "codes": pack(codes, 8 * bits),
        "scale": read("Wscale").float().reshape(1),
        "signs_in": read("SU"),
        "signs_out": read("SV"),
    }
    if len(matrix.members) > 1:
        tensors["scales"] = read("fuse_scales").float()
    if rescales(spec):
        tensors["rescale"] = _rescale(matrix.name, read("scaleWH"))
    found = {f"{matrix.prefix}.{key}": x for key, x in tensors.items()}
    if matrix.biases:
        parts = read("bias").split(matrix.rows)
        found |= {f"{k}.bias": x.clone() for k, x in zip(matrix.members, parts, strict=True)}
    return found


def _rescale(name: str, scale: Tensor) -> Tensor:
    r = exactly(scale, torch.bfloat16)
    if r is None:
        raise UnsupportedModel(
            f"{name}.scaleWH has numbers that bfloat16, in which a checkpoint of quip holds them, "
            "cannot hold exactly; name another folder"
        )
    return r
