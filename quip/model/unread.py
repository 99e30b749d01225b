"""The tensors in the files of a model, as transformers takes them, and which block each is for."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging as transformers_logging

from quip.errors import Unavailable, shown
from quip.packed.files import DAMAGED, INDEX, Index, TensorEntry, header, weight_files
from quip.packed.hub import FILE_DTYPES
from quip.reading import read_json

TYPES = {name: dtype for dtype, name in FILE_DTYPES.items()}
META = torch.device("meta")


@dataclass(frozen=True)
class Unread:
    """A tensor of a file as transformers takes it: `x[...].to(device, dtype)` is its content."""

    entry: TensorEntry
    file: Any = None  # open, to read from; None: there is no content, on the meta device

    def __getitem__(self, _: Any) -> "Unread":
        return self

    def get_dtype(self) -> str:
        return self.entry.dtype

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        if self.file is None:
            stored = TYPES.get(self.entry.dtype)  # that codes keep, where no dtype is asked for
            return torch.empty(self.entry.shape, dtype=dtype or stored, device=META)
        # A copy: a page of a file that is cut short meanwhile would end the process.
        return self.file.get_tensor(self.entry.name).to(dtype=dtype, copy=True)


def entries_of(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a folder's files by name. Raises Unavailable where its index names others."""
    found: dict[str, TensorEntry] = {}
    for path in weight_files(folder):
        found |= header(path)
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, Index, remedy=DAMAGED, called=INDEX)["weight_map"]
        if absent := index.keys() - found:
            name = min(absent)
            raise Unavailable(
                f"{index[name]} lacks {shown(name)}, which {INDEX} says is there; {DAMAGED}"
            )
    return found


def names_by_block(
    model: PreTrainedModel, names: Iterable[str], prefix: str
) -> dict[int | None, list[str]]:
    """The tensors of files that make each block; None: those outside the blocks."""
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    place, state = re.compile(rf"{re.escape(prefix)}\.(\d+)\."), model.state_dict()
    found: dict[int | None, list[str]] = defaultdict(list)
    for name in names:
        own, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        inside = place.match(own) or place.match(name)
        found[int(inside[1]) if inside else None].append(name)
    return found


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@contextmanager
def without_bars() -> Iterator[None]:
    """A block is read without a bar of transformers'."""
    shown_before = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            transformers_logging.enable_progress_bar()
