"""What disks, cables and memory do to files: bits that flip, pages of zeros, halves."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

PAGE = 512  # bytes that are lost at once; the files of tests are small


def flip(path: Path, at: int, bit: int = 3) -> None:
    """Flip one bit of a file; negative positions count from its end."""
    body = bytearray(path.read_bytes())
    body[at] ^= 1 << bit
    path.write_bytes(body)


def clear(path: Path) -> None:
    """Lose the page in the middle of a file."""
    body = path.read_bytes()
    start = len(body) // 2
    path.write_bytes(body[:start] + bytes(PAGE) + body[start + PAGE :])
    assert path.stat().st_size == len(body)
    assert path.read_bytes() != body


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the tensors of model.safetensors."""
    path = folder / "model.safetensors"
    found = {name: x.clone() for name, x in load_file(path).items()}
    edit(found)
    save_file(found, path, metadata={"format": "pt"})


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def start_of(path: Path) -> int:
    """Where the tensors of a safetensors file begin."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def body_of(path: Path) -> bytes:
    """All of a safetensors file but its header."""
    return path.read_bytes()[start_of(path) :]


def spread(path: Path, count: int) -> list[int]:
    """So many positions among its tensors, the first and the last byte included."""
    start, end = start_of(path), path.stat().st_size - 1
    return [start + (end - start) * i // (count - 1) for i in range(count)]


def text_at(path: Path, text: str) -> int:
    """Where the header says this."""
    return path.read_bytes().index(text.encode())


def tensor_at(path: Path, name: str) -> int:
    """The middle byte of a tensor."""
    begin, end = header_of(path)[name]["data_offsets"]
    return start_of(path) + (begin + end) // 2


def header_of(path: Path) -> dict:
    return json.loads(path.read_bytes()[8 : start_of(path)])


def unsigned(path: Path, *words: str) -> None:
    """Write a safetensors file as older versions of quip did, without these words of its header."""
    header, body = header_of(path), body_of(path)
    for word in words:
        del header["__metadata__"][word]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
