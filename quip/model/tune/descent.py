"""Adam with early stopping: the state that is best on what it was not trained on is kept.

States are compared as they would be stored, so that no rounding comes after the choice. It ends
once the held-out loss has not fallen for a while by more than the standard error of its fall.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from quip.model.team import ALONE, Team
from quip.model.tune.dealt import Gradients, Owners, by_place, turns
from quip.model.tune.tunable import MasterWeights
from quip.model.tune.tuning import Tuning

# The mean loss of each of these batches, by number, and without gradients that of each window.
Losses = Callable[[Sequence[int]], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Descent:
    """What tuning came to: the held-out loss of the state before and of the one kept.

    `std_error` is that of their difference, over the windows held out; None of a single one.
    """

    before: float
    after: float
    epochs: int  # begun
    std_error: float | None


@dataclass(frozen=True)
class _Work:
    """The losses of batches of these sizes, and whose batches they are."""

    losses: Losses
    sizes: Sequence[int]
    team: Team
    owners: Owners

    def own(self, batches: Sequence[int], owners: Sequence[int]) -> list[int]:
        pairs = zip(batches, owners, strict=True)
        return [i for i, owner in pairs if owner == self.team.rank]

    def backward(self, batches: Sequence[int], step: Sequence[int]) -> None:
        """Add to every .grad the gradient of what these batches are of the loss of a step."""
        count = sum(self.sizes[i] for i in step)
        with torch.enable_grad():
            for i, (loss, _) in zip(batches, self.losses(batches), strict=True):
                (loss * (self.sizes[i] / count)).backward()


def descend(
    masters: MasterWeights,
    losses: Losses,
    sizes: Sequence[int],
    tuning: Tuning,
    *,
    rng: torch.Generator,
    tell: Callable[[int, float], None] | None = None,
    team: Team = ALONE,
    owners: Owners | None = None,
) -> Descent:
    """Tune, inside the context of the masters, on batches of these sizes (in windows).

    The state of the least held-out loss is kept, and none if that is the one before. `tell` hears
    of each held-out loss, with the windows tuned on by then. Where the loss before is not finite,
    nothing is tuned. In a team every process asks `losses` for those batches alone that `owners`
    say are its own (by default any batch can be), and all come to the same states, bitwise those of
    one process.
    """
    work = _Work(losses, sizes, team, owners or by_place(team))
    train, held = tuning.split(sizes)
    before, first = _held_out(work, held)
    best, kept = before, first
    rates = _rates(masters, tuning)
    if not rates or not math.isfinite(before):
        return Descent(before, before, 0, None)
    optimizer = torch.optim.Adam(rates)
    usual = [group["lr"] for group in optimizer.param_groups]
    windows = sum(sizes[i] for i in train)
    every, done, compared = tuning.every or windows, 0, 0
    last, waits = (before, first), 0  # of the last that was better than noise; comparisons since
    for step in _stream(train, sizes, tuning, rng):
        for group, rate in zip(optimizer.param_groups, usual, strict=True):
            group["lr"] = rate * tuning.share(done / (windows * tuning.epochs))
        _descend_once(optimizer, work, step)
        done += sum(sizes[i] for i in step)
        if done - compared < every and done < windows * tuning.epochs:
            continue
        compared = done
        with masters.as_stored() as state:
            loss, found = _held_out(work, held)
        if tell:
            tell(done, loss)
        if loss < best:
            best, kept = loss, found
            masters.keep(state)
        if not math.isfinite(loss):  # from where no step leads back
            break
        # Of a single window no standard error is known, and any fall counts.
        if not is_noise(last[0], loss, _std_error(last[1], found) or 0.0):
            last, waits = (loss, found), 0
        else:
            waits += 1
        if waits == tuning.patience:
            break
    return Descent(before, best, math.ceil(done / windows), _std_error(first, kept))


def _stream(
    train: Sequence[int], sizes: Sequence[int], tuning: Tuning, rng: torch.Generator
) -> Iterator[list[int]]:
    """The batches of each step of all epochs, in a new order each time."""
    for _ in range(tuning.epochs):
        order = [train[i] for i in torch.randperm(len(train), generator=rng).tolist()]
        yield from _steps(order, sizes, tuning.batch_size)


def _rates(masters: MasterWeights, tuning: Tuning) -> list[dict[str, Any]]:
    """What is tuned, in groups of one rate."""
    groups = [(masters.signs, tuning.signs_lr), (masters.others, tuning.lr)]
    # A step of Adam is as large as its rate, and centroids are as large as the weights of a matrix.
    groups += [([x], tuning.centroids_lr * _rms(x)) for x in masters.centroids]
    return [{"params": params, "lr": lr} for params, lr in groups if params]


def _rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


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


def _descend_once(optimizer: torch.optim.Optimizer, work: _Work, step: Sequence[int]) -> None:
    optimizer.zero_grad()
    if work.team.size == 1:
        work.backward(step, step)
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients, owners = Gradients(parameters, work.team), work.owners(step)
        for turn in turns(owners):
            work.backward(work.own(step[turn], owners[turn]), step)
            gradients.add(owners[turn])
        gradients.put()
    optimizer.step()


@torch.no_grad()
def _held_out(work: _Work, batches: Sequence[int]) -> tuple[float, list[float]]:
    """The mean loss over the windows of these batches, and the loss of each window."""
    owners = work.owners(batches)
    own = work.own(batches, owners)
    heard = [iter(x) for x in work.team.hear(_losses_of(work.losses(own)))]
    total, windows = 0.0, []
    for i, owner in zip(batches, owners, strict=True):
        mean, each = next(heard[owner])
        total += work.sizes[i] * mean
        windows += each
    return total / sum(work.sizes[i] for i in batches), windows


def _losses_of(found: Iterator[tuple[Tensor, Tensor]]) -> list[tuple[float, list[float]]]:
    """The loss of each batch, and of each of its windows."""
    losses = list(found)
    if not losses:
        return []
    means = torch.stack([loss for loss, _ in losses]).tolist()  # waits once
    each = iter(torch.cat([x for _, x in losses]).tolist())
    sizes = [len(x) for _, x in losses]
    return [(mean, [*islice(each, size)]) for mean, size in zip(means, sizes, strict=True)]


def _std_error(before: Sequence[float], after: Sequence[float]) -> float | None:
    """std(before - after) / sqrt(windows): the standard error of the mean gain of a window."""
    if len(before) < 2:
        return None
    return stdev(x - y for x, y in zip(before, after, strict=True)) / math.sqrt(len(before))


def is_noise(before: float, after: float, std_error: float | None) -> bool:
    """Whether a held-out loss fell by no more than the standard error of its fall, if at all.

    None is the standard error of a single window, which cannot tell a gain from noise.
    """
    return std_error is None or before - after <= std_error
