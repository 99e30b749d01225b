"""What of a run is finished: kept by the first process of a team, and known to all of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jaxtyping import Float
from torch import Tensor, nn

from quip.model.block import BlockModule
from quip.model.ledger import Ledger
from quip.model.matrices import find_blocks
from quip.model.parts import packed_parts, put_parts
from quip.model.records import MatrixRecord, record_of
from quip.model.team import Team
from quip.model.tune.blocks import TuningRecord


@dataclass(frozen=True)
class Progress:
    """A ledger, which the first process of a team has, if any; all make the same calls."""

    ledger: Ledger | None
    keeps: bool  # whether there is one
    team: Team
    batch_size: int  # windows of a unit

    @classmethod
    def of(cls, ledger: Ledger | None, team: Team, batch_size: int = 1) -> "Progress":
        """The progress that is kept in the ledger of the first process; None: in nothing."""
        return cls(ledger, team.tell(ledger is not None), team, batch_size)

    def enter(self) -> tuple[int, Float[Tensor, "_own seqlen width"] | None]:
        """The last block whose hidden states are known, and this process's share of these."""
        return self._entered(self.ledger.hidden() if self.ledger else (0, None))

    def serve(self, model: nn.Module) -> None:
        """Let a model that is streamed read its finished blocks from here."""
        if self.ledger:
            self.ledger.serve(model)

    def take_up(
        self, model: nn.Module, count: int
    ) -> tuple[int, Float[Tensor, "_own seqlen width"] | None]:
        """The first of `count` blocks to walk, and this process's share of what enters it."""
        self.serve(model)
        return self._entered(self._taken_up(count))

    def _entered(self, found: tuple[int, Tensor | None]) -> tuple[int, Tensor | None]:
        start, hidden = found
        return self.team.tell(start), self.team.scatter(hidden, self.batch_size)

    def _taken_up(self, count: int) -> tuple[int, Tensor | None]:
        if self.ledger is None:
            return 0, None
        if all(map(self.ledger.has, range(count))):
            return count, None
        if not all(map(self.ledger.has, range(self.ledger.entered))):
            return 0, None  # a block was damaged: only a walk from the first leads further
        return self.ledger.hidden()

    def has(self, block: int) -> bool:
        """Whether a block is finished."""
        return self.keeps and self.team.tell(self.ledger is not None and self.ledger.has(block))

    def restore(
        self, block: int, model: nn.Module
    ) -> tuple[list[MatrixRecord], list[TuningRecord]]:
        """Make a block of the model what it was when it was finished; returns its records."""
        found = self.ledger.restore(block, model) if self.ledger else ([], [])
        if self.team.size == 1:
            return found
        module = model.get_submodule(f"{find_blocks(model)[0]}.{block}")
        host = next(module.parameters()).device
        layout, tensors = packed_parts(module) if self.team.leads else ({}, {})
        words = layout, *([asdict(record) for record in kind] for kind in found)
        words, tensors = self.team.spread(words, tensors, 0, device=host)
        layout, records, tuned = words
        if not self.team.leads:
            put_parts(module, layout, tensors, whole=True)
        return (
            [record_of(MatrixRecord, each) for each in records],
            [record_of(TuningRecord, each) for each in tuned],
        )

    def keep(
        self,
        block: BlockModule,
        records: Sequence[MatrixRecord],
        tuned: Sequence[TuningRecord] = (),
    ) -> None:
        """Write down a finished block, which every process has."""
        if self.ledger:
            self.ledger.keep(block, records, tuned)

    def keep_hidden(self, block: int, hidden: Float[Tensor, "_own seqlen width"]) -> None:
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
