"""What of a run is finished: kept by the first process of a team, and known to all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxtyping import Float
from torch import Tensor, nn

from quip.model.block_module import BlockModule
from quip.model.ledger import Ledger
from quip.model.matrices import find_blocks
from quip.model.records import MatrixRecord
from quip.model.team import Team
from quip.model.tune.blocks import TuningRecord


@dataclass(frozen=True)
class Progress:
    """A ledger, which the first process of a team has, if any; all make the same calls.

    Where the model is streamed each process has one, which its finished blocks are read from.
    """

    ledger: Ledger | None
    keeps: bool  # whether the first process has one
    everywhere: bool  # whether all have
    team: Team
    batch_size: int  # windows of a unit

    @classmethod
    def of(cls, ledger: Ledger | None, team: Team, batch_size: int = 1) -> "Progress":
        """The progress that is kept in the ledger of the first process; None: in nothing."""
        there = team.hear(ledger is not None)
        return cls(ledger, there[0], all(there), team, batch_size)

    def enter(self) -> tuple[int, Float[Tensor, "_own *streams seqlen width"] | None]:
        """The last block whose hidden states are known, and this process's share of these."""
        return self._entered(self.ledger.hidden() if self.ledger else (0, None))

    def take_up(
        self, model: nn.Module, count: int, *, paired: bool = False
    ) -> tuple[int, Float[Tensor, "_own *streams seqlen width"] | None]:
        """The first of `count` blocks to walk, and this process's share of what enters it.

        A paired walk needs the blocks that it passes as they were, and a streamed model has no
        others than finished ones: so they are made again from the first on that is walked.
        """
        start, hidden = self._entered(self._taken_up(count))
        if paired and self.ledger:
            self.ledger.make_again(range(start, count))
        self.serve(model)
        return start, hidden

    def _entered(self, found: tuple[int, Tensor | None]) -> tuple[int, Tensor | None]:
        start, hidden = found
        return self.team.tell(start), self.team.scatter(hidden, self.batch_size)

    def _taken_up(self, count: int) -> tuple[int, Tensor | None]:
        if self.ledger is None or not self.team.leads:
            return 0, None
        if all(map(self.ledger.has, range(count))):
            return count, None
        if not all(map(self.ledger.has, range(self.ledger.entered))):
            return 0, None  # a block was damaged: only a walk from the first leads further
        return self.ledger.hidden()

    def serve(self, model: nn.Module) -> None:
        """Let a model that is streamed read its finished blocks from here."""
        if self.ledger is None or not self.everywhere:
            return
        for block in range(len(find_blocks(model)[1])):
            if self.team.size > 1 and self.has(block):
                self._fetch(self.ledger, block)
        self.ledger.serve(model)

    def has(self, block: int) -> bool:
        """Whether a block is finished."""
        return self.keeps and self.team.tell(self.ledger is not None and self.ledger.has(block))

    def restore(
        self, block: int, model: nn.Module
    ) -> tuple[list[MatrixRecord], list[TuningRecord]]:
        """Make a block of the model what it was when it was finished; returns its records."""
        if self.ledger and self.everywhere:
            return self.ledger.restore(block, model)
        with TemporaryDirectory() as folder:
            ledger = self.ledger or Ledger(Path(folder), {})
            self._fetch(ledger, block)
            return ledger.restore(block, model)

    def _fetch(self, ledger: Ledger, block: int) -> None:
        """Bring the file of a finished block to the ledgers of all processes."""
        held = {"file": ledger.bytes_of(block)} if self.team.leads else {}
        _, found = self.team.spread(None, held, 0)
        if not self.team.leads:
            ledger.take(block, found["file"])

    def keep(
        self,
        block: BlockModule,
        records: Sequence[MatrixRecord],
        tuned: Sequence[TuningRecord] = (),
    ) -> None:
        """Write down a finished block, which every process has."""
        if self.ledger:
            self.ledger.keep(block, records, tuned)

    def keep_hidden(self, block: int, hidden: Float[Tensor, "_own *streams seqlen width"]) -> None:
        """Write down the hidden states that enter a block, of which each process has a share."""
        nbytes = self.team.size * hidden.nbytes  # about
        if not self.team.tell(self.ledger is not None and self.ledger.is_due(nbytes)):
            return
        whole = self.team.gather(hidden, self.batch_size)
        if self.ledger and whole is not None:
            self.ledger.keep_hidden(block, whole)

    def forget_hidden(self) -> None:
        """After the last block nobody needs them."""
        if self.ledger:
            self.ledger.forget_hidden()
