"""The safetensors files of a folder: which there are, what their headers say, what is damage."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quip.errors import Unavailable, one_line, shown
from quip.reading import inside, parse_json, read_json
from quip.shapes import Within, check_shape

DAMAGED = "download or save it again"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 100_000_000  # at most, as safetensors has it


class Index(TypedDict):
    """The index of several files, as save_pretrained writes it."""

    weight_map: Annotated[dict[str, str], Within(1)]


class Entry(TypedDict):
    """What the header of a safetensors file says of a tensor."""

    shape: list[Annotated[int, Within(0)]]
    dtype: str
    data_offsets: Annotated[list[int], Within(2, 2)]


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
    with naming_damage(what, remedy):
        if path.exists() and not path.is_file():  # which may never end, or never begin
            raise OSError("it is no regular file")
        with safe_open(path, framework="pt") as file:
            yield file


def tensors_of(file: Any) -> dict[str, Tensor]:
    """All tensors of a file that is open."""
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


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
        length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER_BYTES, path.stat().st_size):
            raise ValueError(f"a header of {length} bytes")
        words = parse_json(file.read(length).decode(), dict[str, Any])
        words.pop("__metadata__", None)
        check_shape(words, dict[str, Entry])
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
        names = set(read_json(index, Index, remedy=DAMAGED, called=INDEX)["weight_map"].values())
    paths = [inside(folder, name, INDEX) for name in sorted(names)]
    for path in paths:
        if path.suffix != ".safetensors":
            raise Unavailable(f"{INDEX} names {shown(path.name)}, no safetensors file; {DAMAGED}")
        if not path.is_file():
            raise Unavailable(f"there is no {path.name}; {DAMAGED}")
    return paths


def weight_bytes(folder: Path) -> int:
    """The size of all safetensors files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
