"""The safetensors files of a checkpoint that is saved: written whole, or beside parts that exist.

model-00001-of-00003.safetensors     the first block, linked to
model-00002-of-00003.safetensors     the second
model-00003-of-00003.safetensors     all that is outside the blocks, and the guard
model.safetensors.index.json         which file holds which tensor
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from quip.files import replacing
from quip.packed.digests import sign
from quip.packed.files import INDEX, SINGLE, TensorEntry, header, weight_files
from quip.packed.hub import narrowed

SHARD = "4GB"  # larger models are cut into files of at most this size
ONE = "1000GB"  # what is outside the blocks is one file
# Of file systems that have no links, or none from one to another.
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


def write_weights(model: PreTrainedModel, folder: Path, parts: Sequence[Path] = ()) -> None:
    """Write a model's tensors and its config.json, each file with digests.

    The tensors of blocks on the meta device are in `parts`, signed files of the names that the
    model has for them, which are linked to, or copied where that cannot be.
    """
    _save(model, folder, narrowed(model), ONE if parts else SHARD)
    if not parts:
        for path in weight_files(folder):
            sign(path)
        return
    count = len(parts) + 1
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for part, name in zip(parts, names, strict=False):
        link(part, folder / name)
    os.replace(folder / SINGLE, folder / names[-1])
    sign(folder / names[-1])
    _write_index(folder, {name: header(folder / name) for name in names})


def link(file: Path, place: Path) -> None:
    """Another name for a file that is never changed again; on another file system, a copy."""
    try:
        os.link(file, place)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(file, place)


def _save(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor], shard: str) -> None:
    model.save_pretrained(
        folder,
        state_dict=dict(state),
        max_shard_size=shard,
        save_original_format=False,  # or kinds that rename would rename some of a matrix
    )


def _write_index(folder: Path, files: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    words = {
        "metadata": {
            "total_size": sum(entry.nbytes for held in files.values() for entry in held.values())
        },
        "weight_map": dict(sorted((name, file) for file, held in files.items() for name in held)),
    }
    with replacing(folder / INDEX) as partial:
        partial.write_text(json.dumps(words, indent=2) + "\n")
