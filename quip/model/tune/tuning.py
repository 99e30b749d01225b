"""How to tune: rates and their schedule, windows, and when it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from quip.errors import UsageError, shown

CONSTANT, COSINE = "constant", "cosine"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How to tune. Raises UsageError for numbers that mean nothing."""

    epochs: int
    lr: float  # of weights, norms and biases
    signs_lr: float  # of sign vectors
    centroids_lr: float  # of what codebooks learn, as a share of the RMS of each matrix's own
    batch_size: int  # windows a step, at least
    patience: int  # comparisons without improvement after which it ends
    held_out: float  # share of the windows, the last ones, that states are compared on
    every: int | None = None  # windows trained on, at least, between comparisons; None: an epoch
    schedule: str = CONSTANT  # of rates; cosine: they fall to 0 over all epochs

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int and value < 1:
                raise UsageError(f"fine-tuning: {name} {value}: at least 1 is needed")
            if name.endswith("lr") and not 0 <= value < math.inf:
                raise UsageError(f"fine-tuning: {name} {value}: a rate is finite, 0 or more")
        if self.every is not None and self.every < 1:
            raise UsageError(f"fine-tuning: every {self.every}: at least 1 window is needed")
        if self.schedule not in (CONSTANT, COSINE):
            raise UsageError(
                f"fine-tuning: schedule {shown(self.schedule)}: choose {CONSTANT} or {COSINE}"
            )
        if not 0 < self.held_out < 1:
            raise UsageError(
                f"fine-tuning: held_out {self.held_out}: a share between 0 and 1 is needed, both "
                "excluded"
            )

    def held(self, count: int) -> int:
        """How many of `count` windows are held out: at least one, and one is left."""
        if count < 2:
            raise UsageError(
                f"fine-tuning needs 2 windows or more, one of them held out; there is {count}: "
                "raise --nsamples"
            )
        return min(max(1, round(self.held_out * count)), count - 1)

    def share(self, done: float) -> float:
        """What rates are multiplied with when this share of all steps is done."""
        return (1 + math.cos(math.pi * done)) / 2 if self.schedule == COSINE else 1.0

    def split(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """The numbers of the batches to train on, and of those that lie in the windows held out."""
        count = sum(sizes)
        first, starts = count - self.held(count), [sum(sizes[:i]) for i in range(len(sizes))]
        train = [i for i, start in enumerate(starts) if start < first]
        return train, list(range(len(train), len(sizes)))
