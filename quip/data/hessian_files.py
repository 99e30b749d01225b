"""The files of a store of Hessians (quip.data.hessians): how they are read, and what is damage."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from quip.errors import Unavailable
from quip.packed.files import naming_damage, opened

FORMAT = 1
MANIFEST = "manifest.json"
RESUME = "repeat the `quip hessians` that wrote it with --resume"
FACTS = {"model": str, "digest": dict, "dtype": str, "calibration": dict, "complete": bool}
ROW = {"name": str, "matrices": list, "size": int, "block": int, "digest": str}
KINDS = {"lower": (torch.float32, 1), "mean": (torch.float64, 1), "count": (torch.int64, 0)}
PANEL = 1024  # rows that are mirrored at once


def read_manifest(folder: Path) -> dict[str, Any]:
    """What it says, complete or not. Raises Unavailable, naming the remedy, for what is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise Unavailable(
            f"{folder}: no store of Hessians (it holds no {MANIFEST}); make one with: "
            f"quip hessians MODEL DATASET --save {folder}"
        )
    try:
        words = json.loads(path.read_text())
        known = words["format"]
        if known == FORMAT:
            _check_words(words)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    if known != FORMAT:
        raise Unavailable(f"{path} is of format {known}, and this version of quip reads {FORMAT}")
    return words


def _check_words(words: Any) -> None:
    """Raise ValueError, KeyError or TypeError for what this version cannot have written."""
    _check(words, FACTS)
    _check(words["calibration"], {"dataset": str})
    for row in words["inputs"]:
        _check(row, ROW)


def _check(words: Any, kinds: Mapping[str, type]) -> None:
    for key, kind in kinds.items():
        if not isinstance(words[key], kind):
            raise ValueError(f"{key} is {words[key]!r}")


def damaged(path: Path, reason: object) -> Unavailable:
    """To be raised for a manifest that tells no longer what the store holds."""
    named = f"no {reason}" if isinstance(reason, KeyError) else reason
    return Unavailable(f"{path} is damaged ({named}); make it anew with --overwrite")


def rows_before(folder: Path, *, strict: bool) -> tuple[list[dict[str, Any]], bool]:
    """What an earlier store, complete or not, lists; nothing if there is none.

    Or, unless `strict`, if it cannot be read.
    """
    if not (folder / MANIFEST).exists():
        return [], False
    try:
        words = read_manifest(folder)
        return words["inputs"], words["complete"]
    except Unavailable:
        if strict:
            raise
        return [], False


def is_long_enough(folder: Path, row: Mapping[str, Any]) -> bool:
    """Whether the file has the length that its header tells."""
    path = file_of(folder, row["name"])
    try:
        with opened(path, f"{path} is damaged", RESUME):
            return True
    except Unavailable:
        return False


def is_whole(folder: Path, row: Mapping[str, Any]) -> bool:
    """Whether the file holds what the manifest's hash is of."""
    try:
        return bool(read_tensors(folder, row["name"], row["digest"]))
    except Unavailable:
        return False


def read_tensors(folder: Path, name: str, digest: str) -> dict[str, Tensor]:
    """A file's tensors. Raises Unavailable, naming the remedy, unless its hash is the digest."""
    path = file_of(folder, name)
    with naming_damage(f"{path} is damaged", RESUME):
        tensors = load_file(path)
    kinds = {key: (tensor.dtype, tensor.dim()) for key, tensor in tensors.items()}
    if digest_of(tensors) != digest or kinds != KINDS:  # the digest is of bytes alone
        raise Unavailable(
            f"{path} is damaged (its hash is not the manifest's); remove it, and {RESUME}"
        )
    return tensors


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the tensors' names and bytes."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def symmetric(n: int, lower: Float[Tensor, " entries"]) -> Float[Tensor, "n n"]:
    """The float64 matrix of a lower triangle that is flattened row after row."""
    H = torch.zeros(n, n, dtype=torch.float64)
    for i, row in enumerate(lower.split(list(range(1, n + 1)))):
        H[i, : i + 1] = row
    for lo in range(0, n, PANEL):  # in place: for large n, H itself is all that there is room for
        rows, hi = slice(lo, lo + PANEL), lo + PANEL
        H[rows, hi:] = H[hi:, rows].T
        H[rows, rows] += H[rows, rows].tril(-1).T
    return H


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
