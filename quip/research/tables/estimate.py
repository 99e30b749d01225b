"""What a cell will take, before it is run: the stages of a run, by what this machine does.

Stages are those of quip/jobs/forecast, for one process with the model in memory; beside them come
what compares a cell with the original, and the tuning of a checkpoint. Where cells of the model are
done, estimates are scaled by what these took against what was foretold of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from quip.errors import QuipError
from quip.evaluate.memory import resident_bytes
from quip.jobs.agreement import NEW, PROMPT
from quip.jobs.forecast.operations import forward, tuning
from quip.jobs.forecast.rates import Rates, Rounding, measured_rates, measured_rounding
from quip.jobs.forecast.shape import Shape, empty_model, shape_of
from quip.jobs.forecast.sizes import Terms, copies_of, host_bytes, of_weights, packed_size, works
from quip.jobs.forecast.stages import Costs, rounding_of
from quip.jobs.requests import NO_WEIGHTS
from quip.jobs.sensitivity import rescales
from quip.matrix.recipe import Recipe
from quip.model.activations import Activations
from quip.model.device import choose_device, free_host_bytes
from quip.model.load import DTYPES, read_config
from quip.model.states import batch_size_for
from quip.research.tables.cells import Cell
from quip.research.tables.description import recipe_of
from quip.research.tables.papers import known_models
from quip.research.tables.quantized import PROMPTS
from quip.research.tables.tuning import block_tuning, model_tuning, recipe_flags, run_options

START = 15.0  # seconds until what computes is imported, a model loaded and its data read, at least
WINDOWS = 160  # of a data set, where it is not said how many: WikiText-2 has 166 of 2048 tokens
ON_TWO_SIDES = 7  # times as long: rounded on one side, then on both, where rows follow each other


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds and peak bytes of a cell; `scaled` by what cells took that are done."""

    seconds: float
    bytes: int
    scaled: bool


def estimates(cells: Sequence[Cell]) -> list[Estimate | str]:
    """The estimate of each cell, or in a word why it cannot be told."""
    speed: dict[tuple[str, torch.dtype], Speed] = {}
    found: list[Estimate | str] = []
    for cell in cells:
        where = choose_device(cell.settings.device), DTYPES[cell.settings.dtype]
        known = _model(cell.model)
        if isinstance(known, str):
            found.append(known)
            continue
        if where not in speed:
            speed[where] = Speed(torch.device(where[0]), where[1])
        found.append(_estimate(cell, *known, speed[where]))
    return _scaled(cells, found)


def _scaled(cells: Sequence[Cell], found: Sequence[Estimate | str]) -> list[Estimate | str]:
    ratios: dict[str, list[float]] = {}
    for cell, estimate in zip(cells, found, strict=True):
        taken = sum(cell.report().get("seconds", {}).values())
        if taken and not cell.missing() and isinstance(estimate, Estimate):
            ratios.setdefault(cell.model, []).append(taken / estimate.seconds)
    return [
        Estimate(
            seconds=estimate.seconds * median(ratios[cell.model]), bytes=estimate.bytes, scaled=True
        )
        if isinstance(estimate, Estimate) and cell.model in ratios
        else estimate
        for cell, estimate in zip(cells, found, strict=True)
    ]


class Speed:
    """What a machine does in a second, and what recipes take there beside products."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self._dtype = device, dtype
        self.rates: Rates = measured_rates(device, dtype, None, Path())
        self._roundings: list[tuple[Recipe, Rounding]] = []

    def roundings(self, recipe: Recipe | None) -> list[tuple[Recipe, Rounding]]:
        """The one of this recipe, which is measured once."""
        known = [pair for pair in self._roundings if pair[0] == recipe]
        if recipe and not known:
            how = measured_rounding(recipe, self.rates, self.device, self._dtype)
            known = [(recipe, how)]
            self._roundings += known
        return known


def _estimate(cell: Cell, empty: nn.Module, shape: Shape, speed: Speed) -> Estimate:
    s, tuned = cell.settings, model_tuning(cell.flags)
    # A checkpoint that is tuned is another cell's, and a Hessian is described as it is.
    quantizes = not tuned and cell.kind != "hessians"
    recipe = recipe_of(recipe_flags(cell.flags)) if quantizes else None
    seqlen = s.seqlen or min(2048, shape.positions)
    terms = _terms(cell, recipe, shape, seqlen, batch_size_for(seqlen, empty, speed.device))
    roundings = speed.roundings(recipe)
    every = {name: recipe for one in shape.inputs for name in one.names} if recipe else {}
    found = {one: tuple(works(one, every)) if every else () for one in shape.inputs}
    packed = sum(
        packed_size(work, rounding_of(work, roundings).spec)[0]
        for group in found.values()
        for work in group
    )
    stages = Costs(
        shape=shape,
        terms=terms,
        rates=speed.rates,
        works=found,
        roundings=roundings,
        start=START,
        packed=packed,
        written=packed + (shape.numbers - shape.weights) * terms.kept,
    ).seconds(ranks=1, streamed=False)
    if cell.flags.get("two_sided"):
        stages["quantize"] *= ON_TWO_SIDES
        stages["sensitivity"] *= 2  # one pass more, back through each block
    seconds = sum(stages.values())
    weights = shape.active + shape.head
    if tuned:
        model, windows = tuned
        operations = tuning(weights, (windows or s.nsamples) * seqlen, model.epochs)
        seconds += operations / speed.rates.product
    if cell.compares:  # greedy texts of both
        tokens = len(s.evaluate) * PROMPTS * (PROMPT + NEW)
        seconds += 2 * forward(weights, tokens) / speed.rates.product
    memory = host_bytes(
        shape,
        terms,
        base=resident_bytes(),
        packed=packed,
        streamed=False,
        ranks=1,
        cuda=speed.device.type == "cuda",
        free=free_host_bytes(),
        limit=Activations.within(None, None).limit,
    )
    return Estimate(seconds=seconds, bytes=max(memory.values()), scaled=False)


def _terms(cell: Cell, recipe: Recipe | None, shape: Shape, seqlen: int, batch: int) -> Terms:
    s, flags, wide = cell.settings, cell.flags, DTYPES[cell.settings.dtype].itemsize
    blocks, recipes = block_tuning(flags), [recipe] if recipe else []
    options = run_options(flags)
    weighs = options.get("token_weights", NO_WEIGHTS) != NO_WEIGHTS
    return Terms(
        windows=s.nsamples if recipe or cell.kind == "hessians" else 0,
        seqlen=seqlen,
        batch=batch,
        wide=wide,
        kept=wide,
        evaluated=len(s.evaluate) * (s.eval_nsamples or WINDOWS),
        eval_seqlen=seqlen,
        measures=3 if cell.compares else 1,  # a perplexity, and both models beside each other
        dense_bytes=shape.numbers * wide,
        saves=False,
        ledger=recipe is not None,
        copies=copies_of(recipes),
        of_weights=of_weights(recipes),
        epochs=blocks.epochs if blocks else 0,
        streams=2 if options.get("target_shrink") is not None else 1,
        feels=weighs or rescales(recipe) or bool(options.get("two_sided")),
        weighs=weighs,
    )


@cache  # a hub out of reach is asked once
def _model(name: str) -> tuple[nn.Module, Shape] | str:
    """From the config alone, or why there is none. Models of the papers are known by heart."""
    known: Mapping[str, Any] | None = known_models().get(name)
    try:
        config = AutoConfig.for_model(**known["config"]) if known else read_config(name)
        empty = empty_model(config)
        return empty, shape_of(empty)
    except QuipError as error:
        return str(error)
