"""Which rows or columns of a layer are this process's, where several share them out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quip.packed.cut import Cut


@dataclass(frozen=True)
class Share:
    """How many rows of a part of a layer the file has, and which of them this process has."""

    whole: int
    own: slice


def shares(layer: Any, sizes: Sequence[int], output_size: int) -> list[Share]:
    """The share of each part of a layer of vLLM that has so many rows of it (`sizes`) here.

    Where there are more processes than heads of keys and values, some have the same heads.
    """
    if sum(sizes) == output_size:
        return [Share(size, slice(0, size)) for size in sizes]
    found = []
    for i, size in enumerate(sizes):
        alike = getattr(layer, "num_kv_head_replicas", 1) if i else 1
        start = layer.tp_rank // alike * size
        found.append(Share(size * layer.tp_size // alike, slice(start, start + size)))
    return found


def cut_of(layer: Any, parts: Sequence[Share], n: int, whole_n: int) -> Cut | None:
    """How this process's part is cut of a matrix of these parts, n of its inputs here; or not."""
    if n < whole_n:
        return Cut(columns=slice(layer.tp_rank * n, (layer.tp_rank + 1) * n))
    if all(part.own == slice(0, part.whole) for part in parts):
        return None
    rows, above = [], 0
    for part in parts:
        rows.append(slice(above + part.own.start, above + part.own.stop))
        above += part.whole
    return Cut(rows=tuple(rows))
