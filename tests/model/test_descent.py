"""When a tuning compares its states, which it keeps, when it ends, and how its rates fall."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from quip.errors import UsageError
from quip.model.tune.descent import Descent, descend
from quip.model.tune.tunable import MasterWeights
from quip.model.tune.tuning import Tuning

USUAL = {"lr": 1.0, "signs_lr": 0.0, "centroids_lr": 0.0, "batch_size": 2, "held_out": 0.25}


class Scripted(MasterWeights):
    """One number as masters, whose held-out losses are those of a list, window by window."""

    def __init__(self, losses: Sequence[Sequence[float]]) -> None:
        self.x = nn.Parameter(torch.zeros(()))
        self.signs: list[nn.Parameter] = []
        self.centroids: list[nn.Parameter] = []
        self.others = [self.x]
        self.losses = iter(losses)
        self.trained: list[int] = []
        self.steps: list[float] = []  # |what each moved|
        self.kept: list[int] = []  # after how many windows
        self._before = 0.0

    @contextmanager
    def as_stored(self) -> Iterator[int]:
        yield len(self.trained)

    def keep(self, state: int) -> None:
        self.kept.append(state)

    def __call__(self, batches: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        if not torch.is_grad_enabled():
            for x in next(self.losses):
                yield torch.tensor(x), torch.tensor([x])
            return
        for i in batches:
            self.steps.append(abs(self._before - float(self.x.detach())))
            self._before = float(self.x.detach())
            self.trained.append(i)
            yield self.x, self.x.detach()[None]


def run(losses: Sequence[Sequence[float]], **words: object) -> tuple[Scripted, Descent]:
    """Sixteen windows, of which the last four are held out."""
    told = Scripted(losses)
    tuning = Tuning(**{**USUAL, "epochs": 4, "patience": 2, **words})
    found = descend(told, told, [1] * 16, tuning, rng=torch.Generator().manual_seed(0))
    return told, found


def flat(*means: float) -> list[list[float]]:
    """Losses whose falls are the same in each window."""
    return [[mean - 0.1, mean, mean, mean + 0.1] for mean in means]


def test_states_are_compared_once_an_epoch_or_after_so_many_windows():
    told, found = run(flat(5, 4, 3, 2, 1))
    assert told.kept == [12, 24, 36, 48]
    assert (found.before, found.after, found.epochs) == (5, 1, 4)
    told, found = run(flat(*range(20, 0, -1)), every=4, epochs=2)
    assert told.kept == [4, 8, 12, 16, 20, 24]
    told, found = run(flat(9, 8, 7, 6), every=10, epochs=2)  # and at the end
    assert told.kept == [10, 20, 24]


def test_every_epoch_sees_each_window_once():
    told, _ = run(flat(*range(20, 0, -1)), every=5)
    for epoch in range(4):
        assert sorted(told.trained[12 * epoch : 12 * (epoch + 1)]) == list(range(12))


def test_a_fall_within_its_standard_error_is_kept_but_does_not_prolong():
    noisy = [5.0, 5, 5, 5]
    first = [4.9, 5.1, 4.9, 5.0]  # falls of 0.1, -0.1, 0.1, 0: 0.025 +- 0.048
    second = [4.9, 5.1, 4.8, 5.0]
    told, found = run([noisy, first, second, *flat(1, 1)])
    assert told.kept == [12, 24]
    assert found.epochs == 2
    assert found.after == pytest.approx(4.95)


def test_falls_that_are_noise_one_by_one_may_not_be_so_together():
    start = [5.0, 5, 5, 5]
    falls = [[0.3, -0.1, 0.1, 0.0], [-0.1, 0.3, 0.0, 0.1]]  # 0.075 +- 0.085 each
    first = [x - fall for x, fall in zip(start, falls[0], strict=True)]
    second = [x - fall for x, fall in zip(first, falls[1], strict=True)]  # 0.15 +- 0.029
    told, found = run([start, first, second, second, second], patience=2)
    assert found.epochs == 4
    assert told.kept == [12, 24]
    assert found.after == pytest.approx(4.85)


def test_rates_stay_or_fall_as_a_cosine():
    told, _ = run(flat(5, 4, 3, 2, 1))
    steps = told.steps[2::2]
    assert steps == pytest.approx([1.0] * len(steps), rel=1e-3)  # Adam's, of a constant gradient
    told, _ = run(flat(5, 4, 3, 2, 1), schedule="cosine")
    expected = [(1 + math.cos(math.pi * done / 48)) / 2 for done in range(0, 46, 2)]
    assert told.steps[2::2] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("schedule", "linear")])
def test_what_means_nothing_is_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} "):
        Tuning(**{**USUAL, "epochs": 1, "patience": 1, name: value})
