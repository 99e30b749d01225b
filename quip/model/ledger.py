"""The finished blocks of a run on disk, so that a run which was killed goes on where it was.

    fingerprint.json          what every code depends on
    block-0000.safetensors    a finished block, packed, and the records of its matrices
    hidden.safetensors        the hidden states that enter the next block

Each file appears when it is complete. Blocks are never changed again; hidden states are
replaced by those of a later block, so that the disk holds those of one block only; large ones
may take a tenth of the time. A run that was killed may have more blocks than hidden states lead
to: replaying these, whose matrices are there, makes up for them.

Each file bears a digest of all it holds. One that was damaged since is as good as none: its block
is quantized again, from the hidden states that replaying all blocks before it gives.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypedDict

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from quip.errors import QuipError, Unavailable, UsageError, one_line, short, shown
from quip.files import make_folder, replacing, writing
from quip.model.block import BlockModule
from quip.model.matrices import find_blocks
from quip.model.parts import packed_parts, put_parts
from quip.model.records import MatrixRecord, parse_records
from quip.model.tune import TuningRecord
from quip.packed.digests import SEAL, seal_of
from quip.packed.files import naming_damage, opened, tensors_of
from quip.reading import parse_json, read_json
from quip.shapes import Within, check_shape

log = logging.getLogger(__name__)
START_OVER = "start over with --overwrite"
LARGE = 2**30  # bytes, which a disk takes longer for than a GPU for a block
CHANGES = 10  # of fingerprints that are named


class Words(TypedDict):
    """What the file of a block says beside its tensors, the last three as JSON."""

    name: str
    layout: str
    records: str
    tuned: str


class HiddenWords(TypedDict):
    """What the file of hidden states says: which block they enter."""

    block: str


class Ledger:
    """The finished blocks of one run, in a folder of their own.

    The fingerprint says what the codes depend on: two runs of one fingerprint make the same.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder, self.fingerprint = folder, json.loads(json.dumps(fingerprint))
        self._told, self._due = False, 0.0  # when hidden states may be written again

    def open(self) -> None:
        """Make the folder, unless it holds finished blocks of this very run.

        Blocks that were damaged since are removed. Raises UsageError, naming every difference, if
        they are of another.
        """
        path = self.folder / "fingerprint.json"
        if path.exists():
            changes = differences(_read_json(path), self.fingerprint)
            if changes:
                raise UsageError(
                    f"--resume: the run in {self.folder.parent} was another one ({changes}); "
                    "name another folder, or start over with --overwrite"
                )
            self._sift()
            return
        with writing(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            make_folder(self.folder)
        with replacing(path) as partial:
            partial.write_text(json.dumps(self.fingerprint, indent=2) + "\n")

    def has(self, block: int) -> bool:
        return self._block(block).exists()

    def keep(
        self,
        block: BlockModule,
        records: Sequence[MatrixRecord],
        tuned: Sequence[TuningRecord] = (),
    ) -> None:
        """Write down a finished block: all its tensors, and what is known of its matrices."""
        layout, held = packed_parts(block.module)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
        words = {
            "name": block.name,
            "layout": json.dumps(layout),
            "records": json.dumps([asdict(record) for record in records]),
            "tuned": json.dumps([asdict(record) for record in tuned]),
        }
        _write(self._block(block.index), tensors, words)

    def restore(
        self, block: int, model: nn.Module
    ) -> tuple[list[MatrixRecord], list[TuningRecord]]:
        """Make a block of the model what it was when it was finished; returns its records."""
        path = self._block(block)
        tensors, found = _read(path)
        with naming_damage(*_damaged(path)):
            check_shape(found, Words)
            layout = parse_json(found["layout"], dict[str, Any])
            records = parse_records(MatrixRecord, found["records"])
            tuned = parse_records(TuningRecord, found["tuned"])
            name = f"{find_blocks(model)[0]}.{block}"
            if found["name"] != name:
                raise ValueError(f"it is of {shown(found['name'])}, not of {name}")
        module = model.get_submodule(name)
        try:
            host = next(module.parameters()).device
            put_parts(module, layout, {key: x.to(host) for key, x in tensors.items()}, whole=True)
        except (QuipError, RuntimeError) as error:
            what, remedy = _damaged(path)
            raise Unavailable(f"{what} ({one_line(error)}); {remedy}") from error
        return records, tuned

    def keep_hidden(self, block: int, hidden: Float[Tensor, "count seqlen width"]) -> None:
        """Write down the hidden states that enter a block."""
        start = time.monotonic()
        _write(self._hidden, {"hidden": hidden.cpu()}, {"block": str(block)})
        self._due = start + 10 * (time.monotonic() - start)

    def is_due(self, nbytes: int) -> bool:
        """Whether so many bytes of hidden states are to be written down: LARGE ones not always."""
        return nbytes <= LARGE or time.monotonic() >= self._due

    @property
    def entered(self) -> int:
        """The last block whose hidden states are known, without reading these."""
        with suppress(Unavailable), opened(self._hidden, *_damaged(self._hidden)) as file:
            return _entered(file.metadata())
        return 0

    def hidden(self) -> tuple[int, Tensor | None]:
        """The last block whose hidden states are known, and these; block 0 needs none."""
        found = self._take(self._hidden) if self._hidden.exists() else None
        if found is None:
            return 0, None
        tensors, words = found
        with naming_damage(*_damaged(self._hidden)):
            if "hidden" not in tensors:
                raise ValueError("hidden is missing")
            return _entered(words), tensors["hidden"]

    def forget_hidden(self) -> None:
        """After the last block nobody needs them."""
        self._hidden.unlink(missing_ok=True)

    def forget(self) -> None:
        """All but the fingerprint: what is to be taken up is elsewhere, or to be made anew."""
        self.forget_hidden()
        for path in self._blocks():
            path.unlink()

    def _sift(self) -> None:
        """Remove the blocks that are damaged; hidden states are looked at when they are read."""
        for path in self._blocks():
            self._take(path)

    def _take(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """What a file holds; or None, and the file is removed, if it was damaged."""
        try:
            tensors, words = _read(path)
        except Unavailable as error:
            if isinstance(error.__cause__, OSError):  # it may be whole
                raise
            log.warning("%s; it is made again", str(error).removesuffix(f"; {START_OVER}"))
            path.unlink()
            return None
        if SEAL not in words and not self._told:
            log.warning("%s: files of an older quip bear no digest, unverified", self.folder)
            self._told = True
        return tensors, words

    def _blocks(self) -> list[Path]:
        return sorted(self.folder.glob("block-*.safetensors"))

    @property
    def _hidden(self) -> Path:
        return self.folder / "hidden.safetensors"

    def _block(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed from one fingerprint to another, by dotted name; empty if nothing did."""
    found = list(_changes(before, now, ""))
    more = [f"{len(found) - CHANGES} more"] if len(found) > CHANGES else []
    return "; ".join(found[:CHANGES] + more)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in [*before, *(key for key in now if key not in before)]:
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _changes(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{short(f'{prefix}{key}')} was {short(a)}, is now {short(b)}"


def _entered(words: Any) -> int:
    """The number of the block that hidden states enter. Raises ValueError for other words."""
    check_shape(words, HiddenWords)
    return parse_json(words["block"], Annotated[int, Within(0)])


def _write(path: Path, tensors: dict[str, Tensor], words: Mapping[str, str]) -> None:
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={**words, SEAL: seal_of(tensors, words)})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds. Raises Unavailable unless its seal, where it has one, is of just that."""
    with opened(path, *_damaged(path)) as file:
        words = file.metadata() or {}
        tensors = tensors_of(file)
        if words.get(SEAL, seal := seal_of(tensors, words)) != seal:
            raise ValueError("it is not what was written: the digests differ")
        return tensors, words


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any], remedy=_damaged(path)[1])


def _damaged(path: Path) -> tuple[str, str]:
    """How a damaged file is called, and what to do about it."""
    return f"{path} is damaged", START_OVER
