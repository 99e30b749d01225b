"""What a .gguf file says before the data of its tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.integrations.gguf import read_gguf_metadata

from quip.errors import Unavailable, UnsupportedModel, one_line, shown


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors' data."""

    words: dict[str, Any]  # the metadata; arrays of strings as their lengths
    tensors: tuple[str, ...]  # by the names of GGUF

    @property
    def architecture(self) -> str:
        return str(self.words["general.architecture"])

    def own(self) -> dict[str, Any]:
        """What is said of the model itself, without the architecture in front."""
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): value
            for key, value in self.words.items()
            if key.startswith(prefix)
        }


def read_header(name: str, path: Path) -> Header:
    """Raises Unavailable for what is no GGUF file, and UnsupportedModel for a part of a model."""
    try:
        words, tensors = read_gguf_metadata(str(path))
    except Exception as error:  # struct, numpy and the reader itself share no class
        if "general.architecture" not in str(error):
            raise Unavailable(
                f"{name} is not a GGUF file, or a truncated one ({one_line(error)}); "
                "download it again"
            ) from error
        words, tensors = _later_part(path), ()
    if (count := words.get("split.count", 1)) != 1:
        raise UnsupportedModel(
            f"{name} is part {words.get('split.no', 0) + 1} of {count} of a model; join them with "
            "llama-gguf-split --merge"
        )
    if words.get("general.type", "model") != "model":
        raise UnsupportedModel(f"{name} holds a {shown(words['general.type'])}, and no model")
    return Header(words, tensors)


def _later_part(path: Path) -> dict[str, Any]:
    """The keys of a file that names no architecture, as the parts after a first one do not."""
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}
