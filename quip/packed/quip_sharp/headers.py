"""What a folder in the published layout says of itself, before a weight of it is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from transformers import PretrainedConfig

from quip.errors import UnsupportedModel
from quip.packed.files import TensorEntry
from quip.packed.published import Slot, check_held, foreign, model_config, read_words
from quip.packed.quip_sharp.format import ARCHITECTURES, spec_of
from quip.packed.spec import Spec


class Published(TypedDict):
    """What has to be known of a config.json before transformers reads it."""

    quip_params: NotRequired[dict[str, Any] | None]
    architectures: NotRequired[list[str] | None]
    model_type: NotRequired[str | None]


def read_config(folder: Path) -> tuple[PretrainedConfig, Spec]:
    """The model's config without `quip_params`, and what these say."""
    words = read_words(folder, Published)
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
    config = model_config(folder)
    del config.quip_params
    return config, spec


def check(held: Mapping[str, TensorEntry], wanted: Mapping[str, Slot]) -> None:
    """Raise for a tensor that is missing, of another shape or type, or one too many."""
    for name in sorted(wanted.keys() & held.keys()):
        if held[name].dtype == "I16" and name.endswith("Qidxs"):
            raise UnsupportedModel(
                f"{name} holds 16-bit words, as the files of version 0 do; "
                "download the model anew, or quantize it"
            )
    for name in sorted(held.keys() - wanted.keys()):
        if name.rpartition(".")[2] in ("A", "B"):
            raise UnsupportedModel(
                f"{foreign(name)} is a low-rank term (lora_rank), which is not read; name another "
                "folder"
            )
    check_held(held, wanted)
