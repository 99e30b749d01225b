"""One piece of damage to one file, of the kinds that disks, people and enemies do."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 99, 2**31, 2**63, 10**24, 1e308, -0.5, "", "a", "../a", "/etc"),
    *([], {}, [None], [[]], {"a": 1}, ["a"] * 1000, "x" * 33_000, "\ud800", "nan", [1e5] * 20),
)
DEEP = "[" * 200_000
LITERALS = ("NaN", "-Infinity", "9" * 5_000, DEEP, '{"a": 1, "a": 2}', "1e999", '"\\ud800"')
Damage = Callable[[Path, random.Random], str]


def flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} of {len(data)} flipped"


def cut(path: Path, rng: random.Random) -> str:
    keep = rng.randrange(path.stat().st_size)
    os.truncate(path, keep)
    return f"cut to {keep} bytes"


def lengthen(path: Path, rng: random.Random) -> str:
    more = rng.randrange(1, 5000)
    with path.open("ab") as file:
        file.write(rng.randbytes(more))
    return f"{more} bytes more"


def blank(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at = rng.randrange(0, len(data), 4096)
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    path.write_bytes(data)
    return f"the page at {at} zeroed"


def swap(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    size = max(1, min(64, len(data) // 4))
    a, b = (rng.randrange(len(data) - size + 1) for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    path.write_bytes(data)
    return f"{size} bytes at {a} and {b} exchanged"


def remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "removed"


def replace(path: Path, rng: random.Random) -> str:
    """By something that is no file."""
    path.unlink()
    kind = rng.choice(("folder", "pipe", "loop", "device", "nothing"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "nothing":
        path.touch()
    else:
        path.symlink_to(path.name if kind == "loop" else "/dev/zero")
    return f"replaced by a {kind}"


def exchange(path: Path, rng: random.Random) -> str:
    """With another file of the folder."""
    others = sorted(x for x in path.parent.glob("*" + path.suffix) if x != path and x.is_file())
    if not others:
        return flip(path, rng)
    other = rng.choice(others)
    own = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(own)
    return f"exchanged with {other.name}"


def reword(text: str, rng: random.Random, below: str | None = None) -> tuple[str, str]:
    """A JSON text with one value changed, removed, doubled or renamed; `below` a key."""
    words = json.loads(text)
    top = words if below is None else words[below]
    spots = list(_spots(top))
    holder, key = rng.choice(spots)
    what = f"{below or ''} ... {key!r}"
    turn = rng.randrange(6)
    if turn == 0:
        del holder[key]
        return json.dumps(words), f"{what} removed"
    if turn == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
        return json.dumps(words), f"{what} renamed"
    if turn == 2:
        mark, literal = "@here@", rng.choice(LITERALS)
        holder[key] = mark
        return json.dumps(words).replace(f'"{mark}"', literal), f"{what} is {literal[:20]}"
    if turn == 3 and isinstance(holder, list):
        holder.append(holder[key])
        return json.dumps(words), f"{what} twice"
    if turn == 4:
        other, its = rng.choice(spots)
        value = other[its] if its in other or isinstance(other, list) else None
        holder[key] = json.loads(json.dumps(value))
        return json.dumps(words), f"{what} is that of {its!r}"
    holder[key] = rng.choice(NASTY)
    return json.dumps(words), f"{what} is {str(holder[key])[:40]!r}"


def _spots(value: Any) -> Any:
    """Every (holder, key) of lists and mappings."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _spots(value[key])


def json_of(below: str | None = None) -> Damage:
    def damage(path: Path, rng: random.Random) -> str:
        text, what = reword(path.read_text(), rng, below)
        path.write_text(text)
        return what

    return damage


def header(path: Path, rng: random.Random) -> str:
    """Of a safetensors file, with its own length told right."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if rng.randrange(8) == 0:
        lie = rng.choice((0, 1, size - 1, size + 8, 2**40, 2**63))
        path.write_bytes(lie.to_bytes(8, "little") + data[8:])
        return f"the length of the header said to be {lie}"
    text, what = reword(data[8 : 8 + size].decode(), rng)
    words = text.encode(errors="surrogatepass")
    path.write_bytes(len(words).to_bytes(8, "little") + words + data[8 + size :])
    return f"header: {what}"
