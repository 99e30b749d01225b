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
        words, tensors = _read(path)
    except Exception as error:  # struct, numpy and the readers share no class
        raise Unavailable(
            f"{name} is not a GGUF file, or a truncated one ({one_line(error)}); download it again"
        ) from error
    if (count := words.get("split.count", 1)) != 1:
        number = words.get("split.no", 0)
        part = f"part {number + 1} of {count}" if isinstance(number, int) else "a part"
        raise UnsupportedModel(
            f"{name} is {part} of a model; join the parts with llama-gguf-split --merge"
        )
    if "general.architecture" not in words:
        raise Unavailable(f"{name} names no architecture; download it again")
    if words.get("general.type", "model") != "model":
        raise UnsupportedModel(
            f"{name} holds something else than a model, {shown(words['general.type'])}; "
            "give a model"
        )
    return Header(words, tensors)


def _read(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        return read_gguf_metadata(str(path))
    except ValueError as error:
        if "general.architecture" not in str(error):
            raise
    from gguf import GGUFReader  # which reads the parts after a first one, of no architecture

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}, ()
