"""The finished blocks of a run on disk, so that a run which was killed goes on where it was.

    fingerprint.json          what every code depends on
    block-0000.safetensors    a finished block, packed, and the records of its matrices
    hidden.safetensors        the hidden states that enter the next block

Each file appears when it is complete. Blocks are never changed again; hidden states are
replaced by those of the block after, so that the disk holds those of one block only. A run
killed between the two writes has a block more than hidden states: replaying that block, whose
matrices are there, makes up for them.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypedDict

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from quip.errors import QuipError, Unavailable, UsageError, one_line, shown
from quip.files import replacing, writing
from quip.model.block import BlockModule
from quip.model.matrices import find_blocks
from quip.model.records import MatrixRecord, parse_records
from quip.model.tune import TuningRecord
from quip.packed.files import naming_damage, opened
from quip.packed.layout import Layout
from quip.reading import parse_json, read_json
from quip.shapes import Within, check_shape

log = logging.getLogger(__name__)
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

    def open(self) -> None:
        """Make the folder, unless it holds finished blocks of this very run.

        Raises UsageError, naming every difference, if they are of another.
        """
        path = self.folder / "fingerprint.json"
        if path.exists():
            changes = differences(_read_json(path), self.fingerprint)
            if changes:
                raise UsageError(
                    f"--resume: the run in {self.folder.parent} was another one ({changes}); "
                    "name another folder, or start over with --overwrite"
                )
            return
        with writing(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
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
        tensors = {
            name: tensor.cpu().contiguous() for name, tensor in block.module.state_dict().items()
        }
        words = {
            "name": block.name,
            "layout": json.dumps(Layout.of(block.module).to_json()),
            "records": json.dumps([asdict(record) for record in records]),
            "tuned": json.dumps([asdict(record) for record in tuned]),
        }
        with replacing(self._block(block.index)) as partial:
            save_file(tensors, partial, metadata=words)

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
        host, training = next(module.parameters()).device, module.training
        try:
            Layout.from_json(layout).make_room(module)
            module.load_state_dict({key: x.to(host) for key, x in tensors.items()}, assign=True)
        except (QuipError, RuntimeError) as error:
            what, remedy = _damaged(path)
            raise Unavailable(f"{what} ({one_line(error)}); {remedy}") from error
        module.requires_grad_(False).train(training)
        return records, tuned

    def keep_hidden(self, block: int, hidden: Float[Tensor, "count seqlen width"]) -> None:
        """Write down the hidden states that enter a block, in place of those before."""
        with replacing(self._hidden) as partial:
            save_file({"hidden": hidden.cpu()}, partial, metadata={"block": str(block)})

    @property
    def entered(self) -> int:
        """The last block whose hidden states are known, without reading these."""
        if not self._hidden.exists():
            return 0
        with opened(self._hidden, *_damaged(self._hidden)) as file:
            return _entered(file.metadata())

    def hidden(self) -> tuple[int, Tensor | None]:
        """The last block whose hidden states are known, and these; block 0 needs none."""
        if not self._hidden.exists():
            return 0, None
        tensors, words = _read(self._hidden)
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
        for path in self.folder.glob("block-*.safetensors"):
            path.unlink()

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
            yield f"{_short(f'{prefix}{key}')} was {_short(a)}, is now {_short(b)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _entered(words: Any) -> int:
    """The number of the block that hidden states enter. Raises ValueError for other words."""
    check_shape(words, HiddenWords)
    return parse_json(words["block"], Annotated[int, Within(0)])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with opened(path, *_damaged(path)) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any], remedy=_damaged(path)[1])


def _damaged(path: Path) -> tuple[str, str]:
    """How a damaged file is called, and what to do about it."""
    return f"{path} is damaged", "start over with --overwrite"
