"""A store of Hessians in the making, which several processes fill and one writes."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from quip.data.hessians import StoreWriter
from quip.matrix.hessian import Hessian, Observed, sharing
from quip.model.ledger import Ledger
from quip.model.team import Team

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """A store and a ledger, which the first process of a team has; all make the same calls."""

    writer: StoreWriter | None
    ledger: Ledger | None
    team: Team

    @property
    def complete(self) -> bool:
        """Whether nothing is left to collect."""
        return self.team.tell(self.writer is not None and self.writer.complete)

    def check(self, count: int) -> None:
        """Start over where the ledger is past a block whose Hessians were damaged since."""
        writer, ledger = self.writer, self.ledger
        if writer is None or ledger is None:
            return
        entered = ledger.entered
        if any(not writer.has(i) for i in range(count) if i < entered or ledger.has(i)):
            log.warning("%s: files of the store are damaged; starting over for them", writer.folder)
            ledger.forget()

    def has(self, block: int) -> bool:
        """Whether the store has the Hessians of a block."""
        return self.team.tell(self.writer is not None and self.writer.has(block))

    def keep(self, block: int, hessians: Mapping[str, Observed]) -> None:
        """Write down the Hessians of a block, as all processes together have seen them."""
        if self.has(block):
            return
        if self.writer:
            self.writer.keep(block, hessians, total=self._total)
            log.info("block %d: Hessians of %d matrices written", block, len(hessians))
            return
        for names in sharing(hessians):
            self._total(hessians[names[0]])

    def _total(self, observed: Observed) -> Hessian:
        hessian = observed.summed()
        self.team.total(hessian)
        return hessian
