"""The files of a ledger: tensors and words under one seal, so that damage is noticed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from safetensors.torch import save_file
from torch import Tensor

from quip.errors import shown
from quip.files import replacing
from quip.packed.digests import SEAL, digests_of, seal_of
from quip.packed.files import opened, tensors_of
from quip.packed.layout import Layout
from quip.reading import parse_json, read_json
from quip.shapes import Within, check_shape

START_OVER = "start over with --overwrite"


class Words(TypedDict):
    """What the file of a block says beside its tensors, the last three as JSON."""

    name: str
    layout: str
    records: str
    tuned: str


class HiddenWords(TypedDict):
    """What the file of hidden states says: which block they enter."""

    block: str


def block_entered(words: Any) -> int:
    """The number of the block that hidden states enter. Raises ValueError for other words."""
    check_shape(words, HiddenWords)
    return parse_json(words["block"], Annotated[int, Within(0)])


def write_sealed(
    path: Path,
    tensors: dict[str, Tensor],
    words: Mapping[str, str],
    digests: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and words; `digests` are those of the tensors, where they are known."""
    seal = seal_of(digests_of(tensors) if digests is None else digests, words)
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={**words, SEAL: seal})


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds. Raises Unavailable unless its seal, where it has one, is of just that."""
    with opened(path, *damaged(path)) as file:
        words = file.metadata() or {}
        tensors = tensors_of(file)
        if words.get(SEAL, seal := seal_of(digests_of(tensors), words)) != seal:
            raise ValueError("it is not what was written: the digests differ")
        return tensors, words


def read_words(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any], remedy=damaged(path)[1])


def damaged(path: Path) -> tuple[str, str]:
    """How a damaged file is called, and what to do about it."""
    return f"{path} is damaged", START_OVER


def block_words(path: Path, name: str) -> Words:
    """What the file of a block says. Raises Unavailable unless it is of the block of this name."""
    with opened(path, *damaged(path)) as file:
        found: Any = file.metadata()
        check_shape(found, Words)
        if found["name"] != name:
            raise ValueError(f"it is of {shown(found['name'])}, not of {name}")
    return found


def layout_of(words: Words) -> Layout:
    """Which matrices of a block are packed, and as what, by their names in it."""
    return Layout.from_json(parse_json(words["layout"], dict[str, Any]))


def block_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a block by their names in it, as they were written.

    Files of older versions have no others.
    """
    return {key.removeprefix(f"{name}."): x for key, x in read_sealed(path)[0].items()}
