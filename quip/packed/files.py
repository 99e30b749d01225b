"""The safetensors files of a folder: which there are, what their headers say, what is damage."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quip.errors import Unavailable, one_line

DAMAGED = "download or save it again"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def naming_damage(what: str, remedy: str) -> Iterator[None]:
    """What is wrong with a file that is read inside, as `WHAT (the reason); REMEDY`."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise Unavailable(f"{what} ({one_line(error)}); {remedy}") from error


@contextmanager
def opened(path: Path, what: str, remedy: str) -> Iterator[Any]:
    """A safetensors file to read tensors from; raises Unavailable as `naming_damage` does.

    One that is shorter than its header says is damaged, whatever is read of it.
    """
    with naming_damage(what, remedy), safe_open(path, framework="pt") as file:
        yield file


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A tensor of a file, not yet read."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str  # as files name it: F32, I64
    nbytes: int

    def read(self) -> Tensor:
        with opened(self.path, f"{self.path.name} is damaged", DAMAGED) as file:
            return file.get_tensor(self.name)


def header(path: Path, *, damage: str = "is damaged or truncated") -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file by name, none of them read.

    Raises Unavailable, as "NAME `damage` (the reason)", for a file that is no whole one.
    """
    what = f"{path.name} {damage}"
    with opened(path, what, DAMAGED), path.open("rb") as file:
        words = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    words.pop("__metadata__", None)
    return {
        name: TensorEntry(
            name=name,
            path=path,
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
            nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in words.items()
    }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that from_pretrained reads. Raises Unavailable unless all are there."""
    names, index = {SINGLE}, folder / INDEX
    if not (folder / SINGLE).exists() and index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unavailable(f"{INDEX} cannot be read ({one_line(error)}); {DAMAGED}") from error
    for name in sorted(names):
        if not (folder / name).is_file():
            raise Unavailable(f"there is no {name}; {DAMAGED}")
    return [folder / name for name in sorted(names)]


def weight_bytes(folder: Path) -> int:
    """The size of all safetensors files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
