"""The finished blocks of a run on disk, so that a run which was killed goes on where it was.

    fingerprint.json          what every code depends on
    block-0000.safetensors    a finished block, packed, and the records of its matrices
    hidden.safetensors        the hidden states that enter the next block

The file of a block is a part of a checkpoint: its tensors have the names of the model, narrowest
types and digests. A streamed model reads it from there again, and is saved by linking to it.

Each file appears when it is complete. Blocks are never changed again; hidden states are
replaced by those of a later block, so that the disk holds those of one block only; large ones
may take a tenth of the time. A run that was killed may have more blocks than hidden states lead
to: replaying these, whose matrices are there, makes up for them (or they are made again).

Each file bears a digest of all it holds. One that was damaged since is as good as none: its block
is quantized again, from the hidden states that replaying all blocks before it gives.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from quip.errors import QuipError, Unavailable, UsageError, one_line
from quip.files import make_folder, replacing, writing
from quip.model.block_module import BlockModule
from quip.model.fingerprints import differences
from quip.model.ledger_files import (
    START_OVER,
    block_entered,
    block_tensors,
    block_words,
    damaged,
    layout_of,
    read_sealed,
    read_words,
    write_sealed,
)
from quip.model.matrices import find_blocks
from quip.model.records import MatrixRecord, parse_records
from quip.model.stream import Stream, put_state
from quip.model.tune import TuningRecord
from quip.packed.digests import DIGESTS, SEAL, digests_of
from quip.packed.files import naming_damage, opened
from quip.packed.hub import narrow_state
from quip.packed.layout import Layout

log = logging.getLogger(__name__)
LARGE = 2**30  # bytes, which a disk takes longer for than a GPU for a block


class Ledger:
    """The finished blocks of one run, in a folder of their own.

    The fingerprint says what the codes depend on: two runs of one fingerprint make the same.
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, Any], stream: Stream | None = None
    ) -> None:
        """A model that is streamed gets its finished blocks from here, by its `stream`."""
        self._stream = stream
        self.folder, self.fingerprint = folder, json.loads(json.dumps(fingerprint))
        self._told, self._due = False, 0.0  # when hidden states may be written again

    def open(self) -> None:
        """Make the folder, unless it holds finished blocks of this very run.

        Blocks that were damaged since are removed. Raises UsageError, naming every difference, if
        they are of another.
        """
        path = self.folder / "fingerprint.json"
        if path.exists():
            changes = differences(read_words(path), self.fingerprint)
            if changes:
                raise UsageError(
                    f"--resume: the run in {self.folder.parent} was another one ({changes}); "
                    "name another folder, or start over with --overwrite"
                )
            for part in self.parts():
                self._take(part)  # hidden states are looked at when they are read
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
        tensors = {
            f"{block.name}.{name}": tensor.cpu().contiguous()
            for name, tensor in narrow_state(block.module).items()
        }
        digests = digests_of(tensors)
        words = {
            "format": "pt",
            DIGESTS: json.dumps(digests, sort_keys=True),
            "name": block.name,
            "layout": json.dumps(Layout.of(block.module).to_json()),
            "records": json.dumps([asdict(record) for record in records]),
            "tuned": json.dumps([asdict(record) for record in tuned]),
        }
        write_sealed(self._block(block.index), tensors, words, digests)
        self._hand_over(block.index, block.name)

    def serve(self, model: nn.Module) -> None:
        """Make room in a streamed model for all finished blocks, which come from here from now on.

        Raises Unavailable as `restore` does.
        """
        prefix, blocks = find_blocks(model)
        for index in filter(self.has, range(len(blocks)) if self._stream else ()):
            words = block_words(self._block(index), name := f"{prefix}.{index}")
            with self._fitting(index):
                layout_of(words).make_room(blocks[index])
            self._hand_over(index, name)

    def make_again(self, blocks: Iterable[int]) -> None:
        """Let go of these blocks, if they are finished and the model is streamed."""
        for block in filter(self.has, blocks if self._stream else ()):
            self._block(block).unlink()

    def _hand_over(self, block: int, name: str) -> None:
        """From now on the stream, if there is one, reads a finished block from here."""
        if self._stream:
            self._stream.moved(block, partial(block_tensors, self._block(block), name))

    def restore(
        self, block: int, model: nn.Module
    ) -> tuple[list[MatrixRecord], list[TuningRecord]]:
        """Make a block of the model what it was when it was finished; returns its records.

        A model that is streamed has read it already, or will when it needs it (`serve`).
        """
        path = self._block(block)
        found = block_words(path, name := f"{find_blocks(model)[0]}.{block}")
        with naming_damage(*damaged(path)):
            records = parse_records(MatrixRecord, found["records"])
            tuned = parse_records(TuningRecord, found["tuned"])
        if self._stream:
            return records, tuned
        module = model.get_submodule(name)
        host, training = next(module.parameters()).device, module.training
        with self._fitting(block):
            layout_of(found).make_room(module)
            put_state(module, {key: x.to(host) for key, x in block_tensors(path, name).items()})
        module.train(training)
        return records, tuned

    def bytes_of(self, block: int) -> UInt8[Tensor, " bytes"]:
        """The file of a finished block, as it is."""
        return torch.from_numpy(np.fromfile(self._block(block), np.uint8))

    def take(self, block: int, content: UInt8[Tensor, " bytes"]) -> None:
        """Have the file of a block that another ledger has finished."""
        with replacing(self._block(block)) as partial:
            content.numpy().tofile(partial)

    def parts(self) -> list[Path]:
        """The files of all finished blocks, in the order of the blocks."""
        return sorted(self.folder.glob("block-*.safetensors"))

    @contextmanager
    def _fitting(self, block: int) -> Iterator[None]:
        """What does not fit the model, as damage of the block's file."""
        what, remedy = damaged(self._block(block))
        try:
            yield
        except (QuipError, RuntimeError, ValueError) as error:
            raise Unavailable(f"{what} ({one_line(error)}); {remedy}") from error

    def keep_hidden(self, block: int, hidden: Float[Tensor, "count *streams seqlen width"]) -> None:
        """Write down the hidden states that enter a block."""
        start = time.monotonic()
        write_sealed(self._hidden, {"hidden": hidden.cpu()}, {"block": str(block)})
        self._due = start + 10 * (time.monotonic() - start)

    def is_due(self, nbytes: int) -> bool:
        """Whether so many bytes of hidden states are to be written down: LARGE ones not always."""
        return nbytes <= LARGE or time.monotonic() >= self._due

    @property
    def entered(self) -> int:
        """The last block whose hidden states are known, without reading these."""
        with suppress(Unavailable), opened(self._hidden, *damaged(self._hidden)) as file:
            return block_entered(file.metadata())
        return 0

    def hidden(self) -> tuple[int, Tensor | None]:
        """The last block whose hidden states are known, and these; block 0 needs none."""
        found = self._take(self._hidden) if self._hidden.exists() else None
        if found is None:
            return 0, None
        tensors, words = found
        with naming_damage(*damaged(self._hidden)):
            if "hidden" not in tensors:
                raise ValueError("hidden is missing")
            return block_entered(words), tensors["hidden"]

    def forget_hidden(self) -> None:
        """After the last block nobody needs them."""
        self._hidden.unlink(missing_ok=True)

    def forget(self) -> None:
        """All but the fingerprint: what is to be taken up is elsewhere, or to be made anew."""
        self.forget_hidden()
        for path in self.parts():
            path.unlink()

    def _take(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """What a file holds; or None, and the file is removed, if it was damaged."""
        try:
            tensors, words = read_sealed(path)
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

    @property
    def _hidden(self) -> Path:
        return self.folder / "hidden.safetensors"

    def _block(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"
