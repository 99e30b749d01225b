"""Tune a block while it is being quantized: what is left of it makes up for what is gone.

After each group of its matrices (QuIP#, section 5), the sign vectors and centroids of what is
quantized, the norms and biases, and the matrices still to come are tuned so that

    |block(X) - original block(X)|^2 / |original block(X)|^2

becomes small, where X is what the quantized blocks before pass on. QuIP# takes the X of the
original model, so that blocks can be tuned side by side. Here a block sees what it will see; and
in a paired walk (quip.model.twin) it is tuned towards what the original makes of its own inputs.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quip.errors import finite
from quip.matrix.seeds import rng_for
from quip.model.block import Block
from quip.model.team import ALONE, Team
from quip.model.tune.dealt import by_number
from quip.model.tune.descent import descend, is_noise
from quip.model.tune.tunable import MasterWeights
from quip.model.tune.tuning import Tuning
from quip.model.turns import in_turn
from quip.model.twin import Twin

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BlockTuning(Tuning):
    """How to tune each block; the defaults are QuIP#'s.

    They served a model of a million weights too, where ten times the rate of weights made the first
    tunings of every block fail. More epochs, or fewer windows a step, helped.
    """

    epochs: int = 5
    lr: float = 5e-5
    signs_lr: float = 5e-4
    centroids_lr: float = 5e-3
    batch_size: int = 8
    patience: int = 3
    held_out: float = 0.25


@dataclass(frozen=True, kw_only=True)
class TuningRecord:
    """What one tuning of one block came to."""

    block: int
    after: tuple[str, ...]  # the matrices that had just been quantized
    loss_before: float  # held out, relative
    loss_after: float
    epochs: int
    seconds: float
    std_error: float | None = None  # of loss_before - loss_after, over the windows held out

    @property
    def within_noise(self) -> bool:
        return is_noise(self.loss_before, self.loss_after, self.std_error)


class BlockTuner:
    """Tunes a block towards the outputs that it had when this was made, or those of its twin."""

    def __init__(
        self,
        block: Block,
        tuning: BlockTuning,
        *,
        seed: int,
        share: float = 1.0,
        team: Team = ALONE,
    ) -> None:
        """In a team the block has the batches of this process, and those of all are tuned on.

        A block of a paired walk is tuned towards this share of the way to the original's outputs.
        """
        self.block, self.tuning, self.seed, self.team = block, tuning, seed, team
        self._wanted = block.part(share) if isinstance(block, Twin) else block.outputs()

    def _split(self) -> None:
        """Targets for the batches that the block takes by now."""
        team, self._targets = self.team, self._wanted.split(self.block.batch_size)
        means = torch.stack([x.float().square().mean() for x in self._targets]).tolist()
        own = [(mean, len(x)) for mean, x in zip(means, self._targets, strict=True)]
        batches = in_turn(own, team)
        self._sizes = [size for _, size in batches]
        squares = (mean * size for mean, size in batches)
        self._scale = sum(squares) / sum(self._sizes) or 1.0

    def tune(self, after: Sequence[str]) -> TuningRecord:
        """Tune the block as it is now, once these of its matrices have been quantized."""
        start, name = time.perf_counter(), f"{self.block.name}, tuned after {after[-1]}"
        self._split()
        module = self.block.module
        # Norms, biases and the matrices to come: a block that can be walked has no others.
        masters = MasterWeights(module, module.parameters(), dtype=self.block.hidden.dtype)
        with masters:
            found = descend(
                masters,
                self._losses,
                self._sizes,
                self.tuning,
                rng=rng_for(self.seed, name),
                team=self.team,
                owners=by_number(self.team),
            )
        record = TuningRecord(
            block=self.block.index,
            after=tuple(after),
            loss_before=found.before,
            loss_after=found.after,
            epochs=found.epochs,
            seconds=time.perf_counter() - start,
            std_error=found.std_error,
        )
        finite(record.loss_before, f"{name}: the held-out loss")
        log.info(
            "%s: held-out loss %.3g -> %.3g%s, %d epochs, %.2f s",
            name,
            record.loss_before,
            record.loss_after,
            " (within noise)" if record.within_noise else "",
            record.epochs,
            record.seconds,
        )
        return record

    def _losses(self, batches: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        own = [i // self.team.size for i in batches]
        found = self.block.run(own, dtype=torch.float32)
        for i, (_, leaving) in zip(own, found, strict=True):
            target = self._targets[i].to(leaving.device, leaving.dtype)
            squares = (leaving - target).square()
            yield squares.mean() / self._scale, squares.detach().mean(dim=(1, 2)) / self._scale
