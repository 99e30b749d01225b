"""What a folder in the published layout says of itself, before a weight of it is read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from transformers import AutoConfig, PretrainedConfig

from quip.errors import Unavailable, UnsupportedModel, one_line
from quip.packed.files import DAMAGED, INDEX, SINGLE, TensorEntry, header, weight_files
from quip.packed.quip_sharp.format import ARCHITECTURES, Slot, spec_of
from quip.packed.spec import Spec
from quip.reading import read_json


class Published(TypedDict):
    """What has to be known of a config.json before transformers reads it."""

    quip_params: NotRequired[dict[str, Any] | None]
    architectures: NotRequired[list[str] | None]
    model_type: NotRequired[str | None]


DERIVED = "rotary_emb.inv_freq"  # older files hold what config.json says already


def read_config(folder: Path) -> tuple[PretrainedConfig, Spec]:
    """The model's config without `quip_params`, and what these say."""
    path = folder / "config.json"
    if not os.path.isfile(path):
        raise Unavailable(
            "it has no config.json that can be read; name a local folder with all files of the "
            "model"
        )
    words = read_json(path, Published, remedy=DAMAGED, called="its config.json")
    params, made = words.get("quip_params"), words.get("architectures") or []
    kind = str(words.get("model_type"))[:100]
    if params is None:
        raise UnsupportedModel(
            "its config.json has no quip_params, as models published in the layout of QuIP# have; "
            "name the folder of one"
        )
    if len(made) != 1 or ARCHITECTURES.get(made[0]) != words.get("model_type"):
        raise UnsupportedModel(
            f"its architecture is {', '.join(made)[:100] or 'not named'} "
            f"({kind}), and {' and '.join(ARCHITECTURES)} can be read; "
            "name the folder of one"
        )
    spec = spec_of(params)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loaders underneath raise no common class
        raise Unavailable(
            f"its config.json cannot be read ({one_line(error)}); {DAMAGED}"
        ) from error
    del config.quip_params
    return config, spec


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


def check(held: Mapping[str, TensorEntry], wanted: Mapping[str, Slot]) -> None:
    """Raise for a tensor that is missing, of another shape or type, or one too many."""
    for name, slot in wanted.items():
        promise = f"{name}: config.json asks for {' or '.join(slot.dtypes)} {list(slot.shape)}"
        if name not in held:
            raise Unavailable(f"{promise}, and the files have none; {DAMAGED}")
        there = held[name]
        if there.dtype == "I16" and name.endswith("Qidxs"):
            raise UnsupportedModel(
                f"{name} holds 16-bit words, as the files of version 0 do; "
                "download the model anew, or quantize it"
            )
        shape = () if slot.shape == () and there.shape == (1,) else there.shape
        if there.dtype not in slot.dtypes or shape != slot.shape:
            raise Unavailable(
                f"{promise}, and the files have {there.dtype} {list(there.shape)}; {DAMAGED}"
            )
    for name in sorted(set(held) - set(wanted)):
        if name.rpartition(".")[2] in ("A", "B"):
            raise UnsupportedModel(
                f"{name} is a low-rank term (lora_rank), which is not read; name another folder"
            )
        raise UnsupportedModel(
            f"{name} is in the files, and in no model of this config.json; name another folder"
        )
