"""A checkpoint for other tools: a plain Hugging Face folder, or what another program reads."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from quip.errors import NonFinite, QuipError, Unavailable, UsageError, how_to_install
from quip.files import check_new, new_folder, replacing
from quip.model.gguf.returned import check_returned
from quip.model.load import LoadedModel, load_model
from quip.packed.checkpoint import check_folder, to_dense, unmarked
from quip.packed.checks import is_finite
from quip.packed.compressed_tensors.write import compressed_tensors
from quip.packed.files import weight_bytes
from quip.packed.gguf.write import write_gguf
from quip.packed.gptq.format import WORDS
from quip.packed.gptq.write import gptq_tensors
from quip.packed.published import GENERATION
from quip.packed.quip_sharp.write import published_config, published_tensors
from quip.packed.shards import SHARD


def export_dense(
    folder: str | Path, out: str | Path, *, dtype: str = "auto", overwrite: bool = False
) -> int:
    """Write the model with each W_hat as a dense matrix, and its tokenizer.

    Returns the bytes of the files with weights. `dtype` is float32, bfloat16 or float16; auto is
    what the checkpoint computes in. `out` appears when it is complete; with `overwrite` it
    replaces a folder of this name whole.

    Raises UsageError for an `out` that cannot be, NonFinite for weights beyond the dtype's range,
    and Unavailable for a damaged checkpoint or a disk that does not take the files.
    """
    folder, out = Path(folder), Path(out)
    loaded = _loaded(folder, out, dtype=dtype, overwrite=overwrite)
    model = to_dense(loaded.model)
    _check_range(model)
    with new_folder(out, overwrite=overwrite) as partial:
        model.save_pretrained(partial, max_shard_size=SHARD)
        loaded.tokenizer.save_pretrained(partial)
        return weight_bytes(partial)


def export_quip_sharp(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> int:
    """Write the model in the published layout of QuIP#, with its tokenizer.

    Packed matrices go out as they are, norms, embeddings and lm_head as float16. Returns the bytes
    of the files with weights; `out` is as in `export_dense`.

    Raises UsageError for an `out` that cannot be and for matrices that the layout cannot express,
    UnsupportedModel for other models than Llama and Mistral, NonFinite for numbers beyond
    float16, and Unavailable as `export_dense` does.
    """
    folder, out = Path(folder), Path(out)
    loaded = _loaded(folder, out, dtype="auto", overwrite=overwrite)
    try:
        tensors, config = published_tensors(loaded.model), published_config(loaded.model)
    except QuipError as error:
        raise type(error)(f"{folder}: {error}") from error
    with new_folder(out, overwrite=overwrite) as partial:
        save_torch_state_dict(tensors, partial, max_shard_size=SHARD, metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if (folder / GENERATION).is_file():
            shutil.copy(folder / GENERATION, partial)
        loaded.tokenizer.save_pretrained(partial)
        return weight_bytes(partial)


def export_gguf(
    folder: str | Path, out: str | Path, *, overwrite: bool = False
) -> tuple[int, dict[str, int]]:
    """Write the model and its tokenizer to a .gguf file, packed grids as blocks of that format.

    What is not packed goes in the narrowest of float16, bfloat16 and float32 that holds it. Returns
    the bytes of the file, and how many matrices are of each kind of blocks. What the file says is
    read again before it appears, and compared with the checkpoint.

    Raises UsageError for an `out` that cannot be and for matrices that no blocks hold exactly,
    UnsupportedModel for models and tokenizers that GGUF has no words for, and Unavailable as
    `export_dense` does, or without the package gguf.
    """
    folder, out = Path(folder), Path(out)
    if find_spec("gguf") is None:
        raise Unavailable(
            f"GGUF files need the package gguf; install it with: {how_to_install('gguf')}"
        )
    _check_file(out, overwrite=overwrite)
    loaded = _read(folder, dtype="auto")
    model, tokenizer = loaded.model, loaded.tokenizer
    try:
        with replacing(out) as partial:
            kinds = write_gguf(model, tokenizer, partial, name=folder.resolve().name)
            check_returned(partial, model.config, tokenizer)
    except QuipError as error:
        raise type(error)(f"{folder}: {error}") from error
    return out.stat().st_size, kinds


def _check_file(out: Path, *, overwrite: bool) -> None:
    """Raise UsageError for a file that cannot be made, or that is not to be lost."""
    if out.suffix != ".gguf":
        raise UsageError(f"OUT {out}: with --gguf it is a file; give a name that ends in .gguf")
    if out.is_dir() or (out.exists() and not overwrite):
        raise UsageError(f"OUT {out}: it exists; name another file or add --overwrite")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise UsageError(f"OUT {out}: {out.parent} is no folder that can be written to")


def export_compressed_tensors(
    folder: str | Path, out: str | Path, *, asymmetric: bool = False, overwrite: bool = False
) -> int:
    """Write the model in format pack-quantized of compressed-tensors, with its tokenizer.

    Packed grids go out as they are, every weight equal; `asymmetric` lets grids with zeros go too.
    Returns the bytes of the files with weights; `out` is as in `export_dense`.

    Raises UsageError for an `out` that cannot be and for matrices that the format cannot hold, and
    Unavailable as `export_dense` does.
    """
    folder, out = Path(folder), Path(out)
    loaded = _loaded(folder, out, dtype="auto", overwrite=overwrite)
    try:
        tensors, words = compressed_tensors(loaded.model, asymmetric=asymmetric)
    except QuipError as error:
        raise type(error)(f"{folder}: {error}") from error
    with new_folder(out, overwrite=overwrite) as partial:
        _save(loaded, tensors, words, partial)
        return weight_bytes(partial)


def export_gptq(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> int:
    """Write the model in the layout of GPTQ, checkpoint format gptq, with its tokenizer.

    Packed grids go out as they are, every weight equal. Returns the bytes of the files with
    weights; `out` is as in `export_dense`.

    Raises UsageError for an `out` that cannot be and for matrices that the layout cannot hold, and
    Unavailable as `export_dense` does.
    """
    folder, out = Path(folder), Path(out)
    loaded = _loaded(folder, out, dtype="auto", overwrite=overwrite)
    try:
        tensors, words = gptq_tensors(loaded.model)
    except QuipError as error:
        raise type(error)(f"{folder}: {error}") from error
    with new_folder(out, overwrite=overwrite) as partial:
        _save(loaded, tensors, words, partial)
        (partial / WORDS).write_text(json.dumps(words, indent=2) + "\n")
        return weight_bytes(partial)


def _save(
    loaded: LoadedModel, tensors: dict[str, Tensor], words: dict[str, Any], folder: Path
) -> None:
    """The files of a model with these tensors, and these words as its quantization_config."""
    model = unmarked(loaded.model)
    model.config.quantization_config = words
    model.save_pretrained(folder, state_dict=tensors, max_shard_size=SHARD)
    loaded.tokenizer.save_pretrained(folder)


def _loaded(folder: Path, out: Path, *, dtype: str, overwrite: bool) -> LoadedModel:
    """The checkpoint, once it is known that `out` can be written."""
    check_new(out, "OUT", overwrite=overwrite)
    if folder.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"OUT {out}: the checkpoint is in it, and would be lost; name another")
    return _read(folder, dtype=dtype)


def _read(folder: Path, *, dtype: str) -> LoadedModel:
    check_folder(folder)
    return load_model(os.path.join(".", folder), dtype=dtype)  # ./demo is a folder, demo is not


def _check_range(model: nn.Module) -> None:
    """float16 ends at 65504: what is beyond would become infinite."""
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise NonFinite(
                f"{name} holds values beyond the range of {parameter.dtype}; "
                "give --dtype bfloat16 or float32"
            )
