"""LoRA adapters of a model, each served under a name of its own."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from transformers import PreTrainedModel

from quip.errors import QuipError, Unavailable, UsageError, one_line, shown
from quip.reading import inside, read_json

NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")  # peft makes names of modules of them
WEIGHTS = "adapter_model.safetensors"


class Config(TypedDict):
    """What has to be known of an adapter_config.json to tell what it is."""

    peft_type: NotRequired[str | None]


class Adapters:
    """Adapters of one model, of which one or none is at work."""

    def __init__(self, tuner: Any, names: tuple[str, ...]) -> None:
        self._tuner, self.names = tuner, names

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Let one adapter, or none, take part in what the model computes inside the block."""
        if name is None:
            self._tuner.disable_adapter_layers()
        else:
            self._tuner.set_adapter(name)
            self._tuner.enable_adapter_layers()
        yield


def check_adapter(name: str, folder: Path) -> None:
    """Raise QuipError unless a folder holds a LoRA adapter in safetensors, before it is loaded."""
    if not NAME.fullmatch(name):
        raise UsageError(f"--lora {shown(name)}: a name has letters, digits, - and _ only")
    remedy = "name a folder that peft's save_pretrained wrote"
    if not os.path.isfile(folder / "adapter_config.json"):
        raise Unavailable(f"--lora {name}: {folder} has no adapter_config.json; {remedy}")
    config = read_json(folder / "adapter_config.json", Config, remedy=remedy)
    if (kind := config.get("peft_type")) != "LORA":
        raise Unavailable(f"--lora {name}: {folder} holds {shown(kind)}, not LORA; {remedy}")
    if not os.path.isfile(inside(folder, WEIGHTS, "peft")):
        raise Unavailable(f"--lora {name}: {folder} has no {WEIGHTS}; {remedy}")


def load_adapters(model: PreTrainedModel, folders: Mapping[str, Path]) -> Adapters:
    """Put adapters beside the matrices of a model, packed or dense; the codes stay as they are.

    Folders are those that `check_adapter` takes. Raises QuipError for one of another model.
    """
    from peft import LoraConfig, PeftModelForCausalLM

    from quip.packed.peft import register

    tuned: Any = None
    for name, folder in folders.items():
        try:
            config = register(LoraConfig.from_pretrained(str(folder)))
            config.inference_mode = True
            if tuned is None:
                tuned = PeftModelForCausalLM(model, config, adapter_name=name)
            else:
                tuned.add_adapter(name, config)
            result = tuned.load_adapter(str(folder), adapter_name=name)
        except QuipError:
            raise
        except Exception as error:  # peft raises no common class
            raise Unavailable(
                f"--lora {name}: {folder} does not fit the model ({one_line(error)}); name an "
                "adapter of this model"
            ) from error
        lost = [x for x in result.missing_keys if "lora_" in x and f".{name}." in f"{x}."]
        if strange := [*lost, *result.unexpected_keys]:
            raise Unavailable(
                f"--lora {name}: {folder} does not fit the model ({shown(strange[0])} is not in "
                "both); name an adapter of this model"
            )
    return Adapters(tuned.base_model, tuple(folders))
