"""Decodes trellis codes by docs/format.md alone, as format_reader.py does the rest."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

TABLES = Path(__file__).parents[2] / "quip" / "codebooks" / "trellis.safetensors"
FACTORS = {
    "1mad": (34038481, 76625530),
    "3inst": (89226354, 64248484),
    "mcg": (0xCBAC1FED, 0),
    "mul1": (0x83DCD12D, 0),
    "int8": (0xCBAC1FED, 0),
}


def weights_per_step(book: Mapping) -> int:
    return 2 if book["code"] == "hyb" or book["bits"] % 1 else 1


def weights(own: Mapping[str, np.ndarray], codes: np.ndarray, n: int, book: Mapping) -> np.ndarray:
    """W~ of these codes [m, n / V]."""
    V, m = weights_per_step(book), len(codes)
    C = own["table"] if book["own"] else table(book, V)
    t = max(1, round(m / book["rows"]))
    W, first, across = np.empty((m, n)), 0, book["columns"] // V
    for size in (m // t + (i < m % t) for i in range(t)):
        for left in range(0, n // V, across):
            tile = codes[first : first + size, left : left + across]
            found = C[states(tile.flatten(), round(book["bits"] * V), book["states"])]
            columns = slice(left * V, (left + across) * V)
            W[first : first + size, columns] = found.reshape(size, across * V)
        first += size
    return W * own["scale"][np.arange(n) // (book["group"] or n)]


def states(codes: np.ndarray, b: int, L: int) -> list[int]:
    found = []
    for t in range(len(codes)):
        terms = (int(codes[(t - i) % len(codes)]) << b * i for i in range(-(-L // b)))
        found.append(sum(terms) % 2**L)
    return found


def table(book: Mapping, V: int) -> np.ndarray:
    L, name = book["states"], book["code"]
    if name == "learned":
        return load_file(TABLES)[f"learned-{book['bits']:g}-{L}"].astype(float)
    if name == "hyb":
        pairs = load_file(TABLES)[f"hyb-{book['bits']:g}"].astype(float)
        return np.array([pair(s * (s + 1) % 2**32, pairs) for s in range(2**L)])
    a, c = FACTORS[name]
    found = []
    for s in range(2**L):
        x = (a * s + c) % 2**32
        found.append([value(name, x), value(name, (a * x + c) % 2**32)][:V])
    return np.array(found)


def pair(h: int, pairs: np.ndarray) -> np.ndarray:
    return pairs[h // 64 % 512] * [(-1) ** (h >> 15 & 1), (-1) ** (h >> 31 & 1)]


def value(name: str, x: int) -> float:
    total = sum(x.to_bytes(4, "little"))
    if name == "1mad":
        return (total - 510) / 147.800537
    if name == "mul1":
        return float(np.float16((1024 + total) * float(half(0x1EEE)) + float(half(0xC931))))
    if name == "int8":
        return sum((x & 0x3F3F3F3F).to_bytes(4, "little")) - 126
    y = (x & 0x8FFF8FFF) ^ 0x3B603B60
    return float(half(y & 0xFFFF) + half(y >> 16))


def half(bits: int) -> np.float16:
    return np.array(bits, dtype=np.uint16).view(np.float16)[()]
