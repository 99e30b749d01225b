"""What a folder in the published layout says of itself, before a weight of it is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from quip.errors import Unavailable, UnsupportedModel
from quip.packed.layout import DAMAGED
from quip.packed.quip_sharp.format import ARCHITECTURES, Slot, spec_of
from quip.packed.spec import Spec

DERIVED = "rotary_emb.inv_freq"  # older files hold what config.json says already


@dataclass(frozen=True)
class Held:
    """A tensor of a file, not yet read."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def read_config(folder: Path) -> tuple[PretrainedConfig, Spec]:
    """The model's config without `quip_params`, and what these say."""
    path = folder / "config.json"
    try:
        words = json.loads(path.read_text())
        params, made = words.get("quip_params"), words.get("architectures") or []
    except OSError as error:
        raise Unavailable(
            f"it has no config.json that can be read ({error.strerror}); name a local folder with "
            "all files of the model"
        ) from error
    except (ValueError, AttributeError) as error:
        raise Unavailable(f"its config.json is no JSON object ({error}); {DAMAGED}") from error
    if not isinstance(params, Mapping):
        raise UnsupportedModel(
            "its config.json has no quip_params, as models published in the layout of QuIP# have; "
            "name the folder of one"
        )
    if len(made) != 1 or ARCHITECTURES.get(made[0]) != words.get("model_type"):
        raise UnsupportedModel(
            f"its architecture is {', '.join(map(str, made)) or 'not named'} "
            f"({words.get('model_type')}), and {' and '.join(ARCHITECTURES)} can be read; "
            "name the folder of one"
        )
    spec = spec_of(params)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loaders underneath raise no common class
        raise Unavailable(f"its config.json cannot be read ({line(error)}); {DAMAGED}") from error
    del config.quip_params
    return config, spec


def _files(folder: Path) -> list[Path]:
    """The safetensors files, all of which are there."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = {single.name}
    if not single.exists() and index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unavailable(f"{index.name} cannot be read ({line(error)}); {DAMAGED}") from error
    elif not single.exists() and (pickled := sorted(folder.glob("*.bin"))):
        raise Unavailable(
            f"{pickled[0].name} is a pickle, which may run code when it is read; "
            "download the model's safetensors files"
        )
    for name in sorted(names):
        if not (folder / name).is_file():
            raise Unavailable(f"there is no {name}; {DAMAGED}")
    return [folder / name for name in sorted(names)]


def headers(folder: Path) -> dict[str, Held]:
    """Every tensor of its files, by name."""
    held = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    x = file.get_slice(name)
                    held[name] = Held(name, path, tuple(x.get_shape()), x.get_dtype())
        except (SafetensorError, OSError, ValueError) as error:
            raise Unavailable(f"{path.name} is damaged ({line(error)}); {DAMAGED}") from error
    return {name: x for name, x in held.items() if not name.endswith(DERIVED)}


def check(held: Mapping[str, Held], wanted: Mapping[str, Slot]) -> None:
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


def line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
