"""The files of a store of Hessians (quip.data.hessians): how they are read, and what is damage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from quip.errors import Unavailable, shown
from quip.packed.digests import bytes_of
from quip.packed.files import opened, tensors_of
from quip.reading import inside, read_json
from quip.shapes import Within, check_shape

FORMAT = 1
MANIFEST = "manifest.json"
FELT = "felt.safetensors"  # what the loss feels of outputs, where the store was told
RESUME = "repeat the `quip hessians` that wrote it with --resume"
REMADE = f"remove it, and {RESUME}"
ANEW = "make it anew with --overwrite"
PARTS = {"count", "lower", "mean"}  # the tensors of a file
PANEL = 1024  # rows that are mirrored at once


class Row(TypedDict):
    """What the manifest says of an input."""

    name: str
    matrices: Annotated[list[str], Within(1)]
    size: Annotated[int, Within(1)]
    block: Annotated[int, Within(0)]
    digest: str


class Calibration(TypedDict):
    """What has to be known of the stamp of the tokens."""

    dataset: str


class Manifest(TypedDict):
    """What the manifest has to say, beside its format; it says more."""

    model: str
    digest: dict[str, Any]
    dtype: str
    calibration: Calibration
    complete: bool
    token_weights: NotRequired[str]
    inputs: list[Row]


class Versioned(TypedDict):
    """A manifest of any version."""

    format: Any


def read_manifest(folder: Path) -> dict[str, Any]:
    """What it says, complete or not. Raises Unavailable, naming the remedy, for what is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise Unavailable(
            f"{folder}: no store of Hessians (it holds no {MANIFEST}); make one with: "
            f"quip hessians MODEL DATASET --save {folder}"
        )
    words = read_json(path, Versioned, remedy=ANEW)
    if (form := words["format"]) != FORMAT or isinstance(form, bool):
        raise Unavailable(
            f"{path} is of format {shown(form)}, and this version of quip reads {FORMAT}"
        )
    try:
        check_shape(words, Manifest)
        _check_rows(folder, words["inputs"])
    except (ValueError, Unavailable) as error:
        raise damaged(path, error) from error
    return words


def _check_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Raise unless each matrix is of one input, and each input, with a file of its own, of one."""
    feeds: dict[str, str] = {}
    for row in rows:
        file_of(folder, row["name"])
        if row["name"] != row["matrices"][0]:
            raise ValueError(f"the input {shown(row['name'])} is not called by its first matrix")
        for name in row["matrices"]:
            if name in feeds:
                raise ValueError(
                    f"the matrix {shown(name)} stands there twice: of {shown(feeds[name])} and of "
                    + shown(row["name"])
                )
            feeds[name] = row["name"]


def damaged(path: Path, reason: object) -> Unavailable:
    """To be raised for a manifest that tells no longer what the store holds."""
    return Unavailable(f"{path} is damaged ({reason}); {ANEW}")


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
    """Whether the file has the length that its header tells, and the tensors of such an input."""
    try:
        check_header(folder, row["name"], row["size"])
    except Unavailable:
        return False
    return True


def is_whole(folder: Path, row: Mapping[str, Any]) -> bool:
    """Whether the file holds what the manifest's hash is of."""
    try:
        return bool(read_tensors(folder, row["name"], row["size"], row["digest"]))
    except Unavailable:
        return False


def is_of_a_store(path: Path) -> bool:
    """Whether a file, whosever name it bears, holds what a store writes into its files."""
    try:
        with opened(path, str(path), RESUME) as file:
            return set(file.keys()) == PARTS
    except Unavailable:
        return False


def check_header(folder: Path, name: str, size: int) -> None:
    """Raise Unavailable, naming the remedy, unless a file holds the moments of so many inputs."""
    path, triangle = file_of(folder, name), size * (size + 1) // 2
    wanted = {"lower": ("F32", [triangle]), "mean": ("F64", [size]), "count": ("I64", [])}
    with opened(path, f"{path} is damaged", REMADE) as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        for key, kind in wanted.items():
            found = (parts[key].get_dtype(), parts[key].get_shape()) if key in parts else None
            if found != kind:
                there = "missing" if found is None else f"{found[0]} {found[1]}"
                raise ValueError(f"{key} is {there}, not {kind[0]} {kind[1]}")


def read_tensors(folder: Path, name: str, size: int, digest: str) -> dict[str, Tensor]:
    """A file's tensors. Raises Unavailable, naming the remedy, unless its hash is the digest."""
    check_header(folder, name, size)
    path = file_of(folder, name)
    with opened(path, f"{path} is damaged", REMADE) as file:
        tensors = tensors_of(file)
    if moments_digest(tensors) != digest:
        raise Unavailable(f"{path} is damaged (its hash is not the manifest's); {REMADE}")
    return tensors


def moments_digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the tensors' names and bytes."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(bytes_of(tensors[name]))
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
    """The file of an input. Raises Unavailable where the name would lead out of the folder."""
    return inside(folder, f"{name}.safetensors", "the list of its inputs")
