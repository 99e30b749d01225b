"""`quip plan`: a recipe for each matrix within a budget of bits, as a file for `quip run`."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from quip.errors import UnsupportedModel, UsageError
from quip.files import replacing
from quip.jobs.alike import check_request
from quip.jobs.forecast.shape import Input, empty_model, shape_of
from quip.jobs.forecast.sizes import packed_size, works
from quip.jobs.plan import HEAD, build_plan, part_head
from quip.jobs.planning.asked import Planning
from quip.jobs.planning.choices import Choice, Group, groups_of
from quip.jobs.planning.fisher import fisher_damages
from quip.jobs.planning.measured import measured_damages
from quip.jobs.planning.rules import by_rules, uniform
from quip.jobs.planning.words import plan_text
from quip.model.allocation import Option, allocate
from quip.model.device import choose_device
from quip.model.load import read_config
from quip.model.tables import check_tables, table_bits, table_weights
from quip.model.team import Team, joined

ROUNDS = 8  # in which a plan takes up what stacks save
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a plan came to."""

    bits_per_weight: float  # stored, as the plan says
    with_head: float | None  # with embedding and head, where the plan has a row of them
    uniform: float  # bits per weight of the widest single width within the budget
    widths: Mapping[str, float]  # mean bits of the codes by kind of matrix
    damage: float | None  # what is expected of it, in nats per token; None: nothing was measured
    uniform_damage: float | None
    seconds: float


def make_plan(asked: Planning) -> Planned:
    """Choose the width of every matrix, and write the file. Raises UsageError.

    The processes that torchrun started do it together, to the plan of one.
    """
    with joined(asked.device, exact=not asked.fast_reduce) as team:
        return _make(asked, team)


def _make(asked: Planning, team: Team) -> Planned:
    start = time.perf_counter()
    if team.leads:
        _check_out(asked.out, overwrite=asked.overwrite)
    device = torch.device(choose_device(asked.device))
    check_request(team, asked, str(device))
    config = read_config(asked.model)
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(f"{asked.model} is quantized already; give the original")
    model = empty_model(config)
    if asked.head_bits:
        part_head({HEAD: asked.head_bits})
        check_tables(model)
    shape = shape_of(model)
    inputs = shape.inputs
    choices = [Choice.of(width, flags) for width, flags in sorted(asked.choices.items())]
    for choice in choices:
        log.info("%s bits: squared error %.4g of Gaussian weights", choice.width, choice.mse)
    groups = groups_of(inputs, choices, whole_stacks=asked.whole_stacks)
    budget = _budget(groups, asked.bits)
    damages = _damages(asked, groups, device, team)
    stored = partial(_stored, inputs, groups)
    chosen = _within(budget, partial(_choose, asked.by, groups, damages), stored)
    even = _within(budget, partial(uniform, groups), stored)
    weights = sum(group.weights for group in groups)
    together = None
    if asked.head_bits:
        tables = table_weights(model)
        together = stored(chosen) + table_bits(asked.head_bits, shape.width) * tables
        together /= weights + tables
    planned = Planned(
        bits_per_weight=stored(chosen) / weights,
        with_head=together,
        uniform=stored(even) / weights,
        widths=_mean_widths(groups, chosen),
        damage=_sum(damages, chosen),
        uniform_damage=_sum(damages, even),
        seconds=time.perf_counter() - start,
    )
    rows = [(group.patterns, group.choices[i]) for group, i in zip(groups, chosen, strict=True)]
    head = (asked.head_bits, together) if asked.head_bits and together else None
    words, text = plan_text(rows, asked.line, planned.bits_per_weight, head)
    build_plan(words).recipes(name for group in groups for name in group.names)
    if team.leads:
        with replacing(asked.out) as file:
            file.write_text(text)
    return planned


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise UsageError(f"--out {out}: no file can be written there; name another")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out}: it exists; name another file or add --overwrite")


def _budget(groups: Sequence[Group], bits: float) -> int:
    """Bits of all groups. Raises UsageError where they are out of reach, with both ends."""
    weights = sum(group.weights for group in groups)
    ends = [[end(group.bits) for group in groups] for end in (min, max)]
    low, high = (sum(one) / weights for one in ends)
    # What is asked for in three digits may be one of the ends.
    if not round(low, 3) <= bits <= high:
        raise UsageError(
            f"--bits {bits:g}: the narrowest of --choices stores {low:.3f} bits per weight and the "
            f"widest {high:.3f}; ask for what lies between, or name other --choices"
        )
    return max(sum(ends[0]), int(bits * weights))


def _damages(
    asked: Planning, groups: Sequence[Group], device: torch.device, team: Team
) -> list[list[float]] | None:
    """What each choice of each group does to the predictions, in nats; None: not measured."""
    if asked.by == "fisher":
        return fisher_damages(asked, groups, device, team)
    if asked.by == "measured":
        return measured_damages(asked, groups, device, team)
    return None


def _choose(
    by: str, groups: Sequence[Group], damages: list[list[float]] | None, budget: int
) -> list[int]:
    if damages is None:
        rules: dict[str, Callable[[Sequence[Group], int], list[int]]] = {
            "uniform": uniform,
            "rules": by_rules,
        }
        return rules[by](groups, budget)
    options = [
        [Option(bits=b, damage=d) for b, d in zip(group.bits, own, strict=True)]
        for group, own in zip(groups, damages, strict=True)
    ]
    return allocate(options, min(budget, sum(max(group.bits) for group in groups)))


def _within(
    budget: int, choose: Callable[[int], list[int]], stored: Callable[[list[int]], int]
) -> list[int]:
    """The choice of a budget, of which nothing is left that stacks save.

    Groups are counted alone, and matrices of one input and recipe share what a stack stores once.
    """
    room, chosen = budget, choose(budget)
    more = budget - stored(chosen)
    for _ in range(ROUNDS):
        trial = choose(room + more)
        if (left := budget - stored(trial)) < 0:
            more //= 2
        else:
            room, chosen, more = room + more, trial, left
    return chosen


def _stored(inputs: Sequence[Input], groups: Sequence[Group], chosen: Sequence[int]) -> int:
    """Bits that files hold of all matrices, with the stacks that a run makes of them."""
    choices = {
        name: group.choices[index]
        for group, index in zip(groups, chosen, strict=True)
        for name in group.names
    }
    recipes = {name: choice.recipe for name, choice in choices.items()}
    specs = {id(choice.recipe): choice.spec for choice in choices.values()}
    found = (work for one in inputs for work in works(one, recipes))
    return sum(8 * packed_size(work, specs[id(work.recipe)])[0] for work in found)


def _mean_widths(groups: Sequence[Group], chosen: Sequence[int]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for group, index in zip(groups, chosen, strict=True):
        own = sums.setdefault(group.kind, [0.0, 0.0])
        own[0] += group.weights * group.choices[index].width
        own[1] += group.weights
    return {kind: bits / weights for kind, (bits, weights) in sums.items()}


def _sum(damages: Sequence[Sequence[float]] | None, chosen: Sequence[int]) -> float | None:
    if damages is None:
        return None
    return sum(own[index] for own, index in zip(damages, chosen, strict=True))
