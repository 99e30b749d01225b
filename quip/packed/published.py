"""A model's folder of another program, before a weight of it is read: what it says and holds."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from quip.errors import Unavailable, UnsupportedModel, UsageError, one_line, short, shown
from quip.files import check_new
from quip.packed.checkpoint import read_tokenizer
from quip.packed.files import DAMAGED, INDEX, SINGLE, TensorEntry, header, weight_files
from quip.reading import read_json, read_text

GENERATION = "generation_config.json"
DERIVED = "rotary_emb.inv_freq"  # older files hold what config.json says already
FLOAT = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Slot:
    """The shape of a tensor of a file, and the types that it may have there."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def check_out(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Raise UsageError for an OUT that cannot be, or that would take the model with it."""
    check_new(out, "OUT", overwrite=overwrite)
    if folder.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"OUT {out}: the model is in it, and would be lost; name another")


def read_words(folder: Path, shape: Any) -> Any:
    """What config.json says, of this shape. Raises Unavailable where it says something else."""
    path = folder / "config.json"
    if not os.path.isfile(path):  # unlike Path.is_file, for any name
        raise Unavailable(
            "it has no config.json that can be read; name a local folder with all files of the "
            "model"
        )
    return read_json(path, shape, remedy=DAMAGED, called="its config.json")


def model_config(folder: Path) -> PretrainedConfig:
    """The config that transformers makes of config.json, no code of the folder being run."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loaders underneath raise no common class
        raise Unavailable(
            f"its config.json cannot be read ({one_line(error)}); {DAMAGED}"
        ) from error


def headers(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of its files, by name."""
    known = any((folder / name).exists() for name in (SINGLE, INDEX))
    if not known and (pickled := sorted(folder.glob("*.bin"))):
        raise Unavailable(
            f"{pickled[0].name} is a pickle, which may run code when it is read; "
            "download the model's safetensors files"
        )
    held: dict[str, TensorEntry] = {}
    for path in weight_files(folder):
        held |= header(path, damage="is damaged")
    return {name: x for name, x in held.items() if not name.endswith(DERIVED)}


def check_held(held: Mapping[str, TensorEntry], wanted: Mapping[str, Slot]) -> None:
    """Raise for a tensor that is missing, of another shape or type, or one too many."""
    for name, slot in wanted.items():
        promise = f"{name}: config.json asks for {' or '.join(slot.dtypes)} {list(slot.shape)}"
        if name not in held:
            raise Unavailable(f"{promise}, and the files have none; {DAMAGED}")
        there = held[name]
        shape = () if slot.shape == () and there.shape == (1,) else there.shape
        if there.dtype not in slot.dtypes or shape != slot.shape:
            raise Unavailable(
                f"{promise}, and the files have {there.dtype} {list(there.shape)}; {DAMAGED}"
            )
    for name in sorted(set(held) - set(wanted)):
        raise UnsupportedModel(
            f"{foreign(name)} is in the files, and in no model of this config.json; name another "
            "folder"
        )


def exactly(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """x in another type; None if that cannot hold it exactly."""
    y = x.to(dtype)
    wide = torch.promote_types(x.dtype, dtype)
    return y if torch.equal(y.to(wide), x.to(wide)) else None


def foreign(name: str) -> str:
    """The name of a tensor, which a file may choose, as part of one line."""
    return short(name) if name.isprintable() else shown(name)


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. Raises Unavailable where there is none."""
    remedy = "give --tokenizer NAME, the hub id or folder of the original model"
    try:
        return read_tokenizer(name)
    except Exception as error:  # the loaders underneath raise no common class
        raise Unavailable(f"no usable tokenizer in {name} ({one_line(error)}); {remedy}") from error


def generation_of(folder: Path) -> dict[str, str]:
    """The file that says how to generate, as it is, if there is one and it is JSON."""
    path = folder / GENERATION
    if not path.is_file():
        return {}
    read_json(path, dict[str, Any], remedy=DAMAGED, called=GENERATION)
    return {GENERATION: read_text(path)}
