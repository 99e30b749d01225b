"""What a cell will take, before it is run: a count of operations over what this machine does.

Operations are those of quip/jobs/forecast/operations.py, at the rate of a matrix product in the
model's dtype, timed here; attention is left out. Where cells of the model are done, estimates are
scaled by what these took against what was counted for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig

from quip.errors import QuipError
from quip.jobs.forecast.operations import forward, observing, rounding, sweeping, tuning
from quip.jobs.forecast.rates import product_rate
from quip.jobs.forecast.shape import Shape, empty_model, shape_of
from quip.model.device import choose_device
from quip.model.load import DTYPES, read_config
from quip.research.tables.cells import Cell
from quip.research.tables.description import recipe_of
from quip.research.tables.papers import known_models
from quip.research.tables.tuning import block_tuning, model_tuning, recipe_flags

IMPORTS = 0.5e9  # bytes of a process that has loaded torch and transformers
START = 15.0  # seconds until a model is loaded and its data are read, at least
WINDOWS = 160  # of a data set, where it is not said how many: WikiText-2 has 166 of 2048 tokens


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds and peak bytes of a cell; `scaled` by what cells took that are done."""

    seconds: float
    bytes: float
    scaled: bool


def estimates(cells: Sequence[Cell]) -> list[Estimate | str]:
    """The estimate of each cell, or in a word why it cannot be told."""
    speed: dict[tuple[str, torch.dtype], float] = {}
    found: list[Estimate | str] = []
    for cell in cells:
        where = choose_device(cell.settings.device), DTYPES[cell.settings.dtype]
        if where not in speed:
            speed[where] = product_rate(*where)
        shape = _shape(cell.model)
        if isinstance(shape, str):
            found.append(shape)
            continue
        seconds = START + _operations(cell, shape) / speed[where]
        found.append(Estimate(seconds=seconds, bytes=_bytes(cell, shape), scaled=False))
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


def _operations(cell: Cell, shape: Shape) -> float:
    s, flags = cell.settings, cell.flags
    seqlen = s.seqlen or min(2048, shape.positions)
    windows = len(s.evaluate) * (s.eval_nsamples or WINDOWS)
    total = forward(shape.weights + shape.head, windows * seqlen)
    if flags.get("wbits") == 16:
        return total
    tokens = s.nsamples * seqlen
    if asked := model_tuning(flags):  # of a checkpoint that another cell has made
        tuned, chosen = asked
        weights = shape.weights + shape.head
        return total + tuning(weights, (chosen or s.nsamples) * seqlen, tuned.epochs)
    if blocks := block_tuning(flags):
        total += tuning(shape.weights, tokens, blocks.epochs) * len(shape.inputs) / shape.blocks
    total += 2 * forward(shape.weights, tokens)
    total += observing([one.columns for one in shape.inputs], tokens)
    solve = 5.0 if flags.get("quant", "ldlq") != "ldlbal_admm" else 400.0
    recipe = recipe_of(recipe_flags(flags))
    rotated = bool(flags.get("incoh_processing") or flags.get("pre_proj"))
    for m, n in shape.matrices:
        total += sweeping(recipe, m, n) + rounding(recipe, m, n)
        total += solve * n**3 if rotated else solve * n**3 / 2  # inputs that are shared
    return total


def _bytes(cell: Cell, shape: Shape) -> float:
    """Weights, hidden states, Hessians of a block, and what the largest matrix works with."""
    s = cell.settings
    seqlen = s.seqlen or min(2048, shape.positions)
    wide = 4 if s.dtype in ("auto", "float32") else 2
    n, hidden = shape.widest, s.nsamples * seqlen * shape.width * wide
    if cell.flags.get("wbits") == 16:
        hidden, n = 0, 0
    hessians = 8.0 * sum(one.columns**2 for one in shape.inputs) / shape.blocks
    return IMPORTS + shape.numbers * wide + hidden + hessians + 6 * 8.0 * n * n


@cache  # a hub out of reach is asked once
def _shape(model: str) -> Shape | str:
    """From the config alone, or why there is none. Models of the papers are known by heart."""
    known: Mapping[str, Any] | None = known_models().get(model)
    try:
        config = AutoConfig.for_model(**known["config"]) if known else read_config(model)
        return shape_of(empty_model(config))
    except QuipError as error:
        return str(error)
