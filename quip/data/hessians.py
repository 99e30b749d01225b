"""The second moments of a model's inputs on disk: one file for each distinct input.

    manifest.json         whose inputs they are, and which files there are
    NAME.safetensors      lower: the lower triangle of H = E[x x^T], float32, row after row
                          mean: E[x], float64;  count: tokens (of an expert, those sent to it)
    felt.safetensors      what the loss feels of each matrix (quip.model.sensitivity), if asked for

With token_weights in the manifest, H = E[s x x^T] / E[s] and mean = E[s x] / E[s].
NAME is the first matrix that an input feeds. Files appear when they are complete, and the manifest
lists a block once all of its files are there. It says `complete` when the last block is.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from quip.data.hessian_files import (
    FELT,
    FORMAT,
    MANIFEST,
    RESUME,
    check_header,
    file_of,
    is_long_enough,
    is_of_a_store,
    is_whole,
    moments_digest,
    read_manifest,
    read_tensors,
    rows_before,
    symmetric,
)
from quip.errors import Unavailable, UsageError, shown
from quip.files import make_folder, replacing, writing
from quip.matrix.hessian import Hessian, Observed, sharing


@dataclass(frozen=True, kw_only=True)
class StoredInput:
    """One distinct input of the matrices of a model."""

    name: str  # of the first matrix that it feeds
    matrices: tuple[str, ...]  # all that it feeds, in the order of the model
    size: int
    block: int


@dataclass(frozen=True)
class Moments:
    """What is known of one input x."""

    H: Float[Tensor, "n n"]  # E[x x^T], float64, symmetric, each entry exactly a float32
    mean: Float[Tensor, " n"]  # E[x], float64
    count: int  # tokens


class HessianStore:
    """A complete store, to read from; `quip hessians` makes one.

    manifest: model (its name), calibration (the stamp of the tokens), source ("original", or the
    recipe that the blocks before each were quantized with), seed, dtype, device, versions,
    digest (of the model), inputs.
    """

    def __init__(self, folder: Path) -> None:
        """Raises Unavailable, naming the remedy, for what is no complete store."""
        self.folder = folder
        self.manifest: Mapping[str, Any] = read_manifest(folder)
        if not self.manifest["complete"]:
            raise Unavailable(f"{folder}: the store is not complete; {RESUME}")
        rows = self.manifest["inputs"]
        self.inputs = tuple(
            StoredInput(
                name=row["name"],
                matrices=tuple(row["matrices"]),
                size=row["size"],
                block=row["block"],
            )
            for row in rows
        )
        self._digests = {row["name"]: row["digest"] for row in rows}
        self._input_of = {name: one for one in self.inputs for name in one.matrices}
        for name in self._digests:
            if not file_of(folder, name).is_file():
                raise Unavailable(f"{file_of(folder, name)} is missing from the store; {RESUME}")

    @property
    def stamp(self) -> dict[str, Any]:
        """The stamp of the tokens that were seen (`Tokens.stamp`)."""
        return self.manifest["calibration"]

    @property
    def digest(self) -> str:
        """A hash of the manifest, and so of all moments, whose hashes it holds; and of FELT."""
        digest = xxhash.xxh3_128((self.folder / MANIFEST).read_bytes())
        if self.felt:
            digest.update(self.felt.read_bytes())
        return digest.hexdigest()

    @property
    def token_weights(self) -> str | None:
        """The labels by which tokens were weighed; None: all alike."""
        return self.manifest.get("token_weights")

    @property
    def felt(self) -> Path | None:
        """The file of what the loss feels of each matrix, if there is one."""
        return path if (path := self.folder / FELT).is_file() else None

    def read(self, name: str) -> Moments:
        """The moments of an input, by the name of any matrix that it feeds, in host memory.

        Raises UsageError for a name that the store does not hold, Unavailable for a damaged file.
        """
        if name not in self._input_of:
            raise UsageError(f"{self.folder}: no Hessian of {name}; the store is of another model")
        one = self._input_of[name]
        found = read_tensors(self.folder, one.name, one.size, self._digests[one.name])
        H = symmetric(one.size, found.pop("lower"))
        return Moments(H, found["mean"], int(found["count"]))

    def check(self, places: Mapping[str, tuple[int, int]]) -> None:
        """Raise UsageError, naming the matrix, unless the whole store fits a model.

        `places` are the block and the number of inputs of all matrices of the model that are
        quantized, by name. Headers of all files are read: one that is damaged is Unavailable.
        """
        whose = shown(self.manifest["model"])
        for name, (block, n) in places.items():
            known = self._input_of.get(name)
            if known is None or (known.block, known.size) != (block, n):
                what = f"{known.size} inputs, block {known.block}" if known else "nothing of it"
                raise UsageError(
                    f"the store {self.folder} does not fit the model: {name} has {n} inputs, block "
                    f"{block}, and the store holds {what}; it is of {whose}"
                )
        for name in self._input_of:
            if name not in places:
                raise UsageError(
                    f"the store {self.folder} does not fit the model, which has no {shown(name)}; "
                    f"it is of {whose}"
                )
        for one in self.inputs:
            check_header(self.folder, one.name, one.size)


class StoreWriter:
    """A store while it is written, block by block; `close` makes it complete."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], *, resume: bool = False) -> None:
        """The store of these facts (what its manifest says) in a folder that may exist.

        With `resume`, blocks that are there, each file of them whole, are kept; of a complete
        store only the lengths of files are looked at, since `read` hashes what it reads. Raises
        Unavailable for a manifest that is damaged. Otherwise what an earlier store holds is
        removed.
        """
        self.folder, self.facts, self.complete = folder, dict(facts), False
        self._rows: list[dict[str, Any]] = []
        rows, complete = rows_before(folder, strict=resume)
        if resume:
            check = is_long_enough if complete else is_whole
            broken = {row["block"] for row in rows if not check(folder, row)}
            self._rows = [row for row in rows if row["block"] not in broken]
            self.complete = complete and not broken
            if self.complete:
                return
        with writing(folder):
            make_folder(folder)
            if not resume:
                (folder / FELT).unlink(missing_ok=True)
            for row in () if resume else rows:
                if is_of_a_store(path := file_of(folder, row["name"])):
                    path.unlink()
        self._write()

    def has(self, block: int) -> bool:
        """Whether the store holds every input of a block that has any."""
        return any(row["block"] == block for row in self._rows)

    def keep(
        self,
        block: int,
        hessians: Mapping[str, Observed],
        *,
        total: Callable[[Observed], Hessian] = lambda observed: observed.summed(),
    ) -> None:
        """Write down the Hessians of a block's matrices, those that share an input once.

        One is held at a time, of those that are summed up when they are asked for, by `total`.
        """
        rows = []
        for names in sharing(hessians):
            hessian = total(hessians[names[0]])
            count = hessians[names[0]].count
            H = hessian.value().float()
            tensors = {
                "lower": torch.cat([row[: i + 1] for i, row in enumerate(H)]).cpu(),
                "mean": hessian.mean().cpu(),
                "count": torch.tensor(count),
            }
            with replacing(file_of(self.folder, names[0])) as partial:
                save_file(tensors, partial)
            rows.append(
                {
                    "name": names[0],
                    "matrices": names,
                    "size": len(H),
                    "block": block,
                    "count": count,
                    "digest": moments_digest(tensors),
                }
            )
        kept = [row for row in self._rows if row["block"] != block]
        self._rows = sorted([*kept, *rows], key=lambda row: row["block"])
        self._write()

    def close(self) -> None:
        """Declare the store complete."""
        self.complete = True
        self._write()

    @property
    def files(self) -> list[Path]:
        """One for each input."""
        return [file_of(self.folder, row["name"]) for row in self._rows]

    def _write(self) -> None:
        words = {"format": FORMAT, **self.facts, "complete": self.complete, "inputs": self._rows}
        with replacing(self.folder / MANIFEST) as partial:
            partial.write_text(json.dumps(words, indent=2) + "\n")
