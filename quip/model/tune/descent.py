"""Adam with early stopping: the state that is best on what it was not trained on is kept.

States are compared as they would be stored, so that no rounding comes after the choice.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from quip.errors import UsageError
from quip.model.tune.tunable import MasterWeights

# The mean loss of each of these batches, by number.
Losses = Callable[[Sequence[int]], Iterator[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How to tune. Raises UsageError for numbers that mean nothing."""

    epochs: int
    lr: float  # of weights, norms and biases
    signs_lr: float  # of sign vectors
    batch_size: int  # windows a step, at least
    patience: int  # epochs without improvement after which it ends
    held_out: float  # share of the windows, the last ones, that states are compared on

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int and value < 1:
                raise UsageError(f"fine-tuning: {name} {value}: at least 1 is needed")
            if name.endswith("lr") and not 0 <= value < math.inf:
                raise UsageError(f"fine-tuning: {name} {value}: a rate is finite, 0 or more")
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

    def split(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """The numbers of the batches to train on, and of those that lie in the windows held out."""
        count = sum(sizes)
        first, starts = count - self.held(count), [sum(sizes[:i]) for i in range(len(sizes))]
        train = [i for i, start in enumerate(starts) if start < first]
        return train, list(range(len(train), len(sizes)))


@dataclass(frozen=True)
class Descent:
    """What tuning came to: the held-out loss of the state before and of the one kept."""

    before: float
    after: float
    epochs: int


def descend(
    masters: MasterWeights,
    losses: Losses,
    sizes: Sequence[int],
    tuning: Tuning,
    *,
    rng: torch.Generator,
    tell: Callable[[int, float], None] | None = None,
) -> Descent:
    """Tune, inside the context of the masters, on batches of these sizes (in windows).

    The state of the least held-out loss is kept, and none if that is the one before. `tell` hears
    of each epoch's held-out loss.
    """
    train, held = tuning.split(sizes)
    best = before = _mean(losses, held, sizes)
    groups = [(masters.signs, tuning.signs_lr), (masters.others, tuning.lr)]
    rates = [{"params": params, "lr": lr} for params, lr in groups if params]
    if not rates:
        return Descent(before, before, 0)
    optimizer, best_epoch, epoch = torch.optim.Adam(rates), 0, 0
    while epoch < tuning.epochs and epoch - best_epoch < tuning.patience:
        epoch += 1
        order = [train[i] for i in torch.randperm(len(train), generator=rng).tolist()]
        for step in _steps(order, sizes, tuning.batch_size):
            _descend_once(optimizer, losses, step, sizes)
        with masters.as_stored() as state:
            loss = _mean(losses, held, sizes)
        if tell:
            tell(epoch, loss)
        if loss < best:
            best, best_epoch = loss, epoch
            masters.keep(state)
        if not math.isfinite(loss):  # from where no step leads back
            break
    return Descent(before, best, epoch)


def _steps(order: Sequence[int], sizes: Sequence[int], least: int) -> Iterator[list[int]]:
    """The batches of each step: as few as have so many windows; the last may have less."""
    step: list[int] = []
    for i in order:
        step.append(i)
        if sum(sizes[i] for i in step) >= least:
            yield step
            step = []
    if step:
        yield step


def _descend_once(
    optimizer: torch.optim.Optimizer, losses: Losses, step: Sequence[int], sizes: Sequence[int]
) -> None:
    optimizer.zero_grad()
    count = sum(sizes[i] for i in step)
    with torch.enable_grad():
        for size, loss in zip([sizes[i] for i in step], losses(step), strict=True):
            (loss * (size / count)).backward()
    optimizer.step()


@torch.no_grad()
def _mean(losses: Losses, batches: Sequence[int], sizes: Sequence[int]) -> float:
    """Over the windows of these batches."""
    weights = [sizes[i] for i in batches]
    found = zip(weights, losses(batches), strict=True)
    return sum(size * float(loss) for size, loss in found) / sum(weights)
