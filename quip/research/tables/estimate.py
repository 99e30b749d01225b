"""What a cell will take, before it is run: a count of operations over what this machine does.

With N calibration tokens, a matrix of m outputs and n inputs costs

    forward       2 m n N, twice: to observe a block, and to pass on what it has become
    observe       2 n^2 N for each distinct input, of which panels skip three eighths
    quantize      m n^2 for the sweep, 2 m n^2 for each greedy pass, 5 n^3 to factorise; Algorithm 5
                  solves twice 2 n^3 in each of up to 100 iterations
    learn         codebooks of k centroids: 3 k m n for each iteration of EM, 2 m n^2 for each of
                  up to 30 steps of their update
    search        a trellis of s states: 3 s m n, twice, for each scale that is tried and each pass
    evaluate      2 (m n) for each token, and the vocabulary
    tune          6 m n for each token and epoch, of a block after each of its inputs, of a
                  whole model with the vocabulary

at the rate of a matrix product in the model's dtype, timed here; attention is left out. Where cells
of the model are done, estimates are scaled by what these took against what was counted for them.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quip.codebooks import Learned, Trellis
from quip.errors import QuipError
from quip.evaluate.memory import module_bytes
from quip.matrix.centroids import UpdateCentroids
from quip.matrix.polish import Greedy
from quip.matrix.recipe import Recipe
from quip.model.device import choose_device
from quip.model.load import DTYPES, read_config
from quip.model.matrices import coverage, find_blocks
from quip.research.tables.cells import Cell
from quip.research.tables.description import recipe_of
from quip.research.tables.papers import known_models
from quip.research.tables.tuning import block_tuning, model_tuning, recipe_flags

IMPORTS = 0.5e9  # bytes of a process that has loaded torch and transformers
START = 15.0  # seconds until a model is loaded and its data are read, at least
WINDOWS = 160  # of a data set, where it is not said how many: WikiText-2 has 166 of 2048 tokens
PANELS = 5 / 8
SHARING = ("k_proj", "v_proj", "up_proj")  # matrices that share the input of another


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds and peak bytes of a cell; `scaled` by what cells took that are done."""

    seconds: float
    bytes: float
    scaled: bool


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a model decides the cost."""

    matrices: tuple[tuple[int, int], ...]  # (m, n) of those that are quantized
    inputs: tuple[int, ...]  # n of each distinct input
    head: int  # weights that turn hidden states into logits
    bytes: int  # of all weights in float32
    block_bytes: int
    blocks: int
    width: int
    positions: int


def estimates(cells: Sequence[Cell]) -> list[Estimate | str]:
    """The estimate of each cell, or in a word why it cannot be told."""
    speed: dict[tuple[str, torch.dtype], float] = {}
    found: list[Estimate | str] = []
    for cell in cells:
        where = choose_device(cell.settings.device), DTYPES[cell.settings.dtype]
        if where not in speed:
            speed[where] = _flops(*where)
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
    weights = sum(m * n for m, n in shape.matrices)
    windows = len(s.evaluate) * (s.eval_nsamples or WINDOWS)
    total = 2.0 * (weights + shape.head) * windows * seqlen
    if flags.get("wbits") == 16:
        return total
    tokens = s.nsamples * seqlen
    if asked := model_tuning(flags):  # of a checkpoint that another cell has made
        tuning, chosen = asked
        return total + 6.0 * tuning.epochs * (chosen or s.nsamples) * seqlen * (
            weights + shape.head
        )
    if tuning_of_blocks := block_tuning(flags):
        inputs = len(shape.inputs) / shape.blocks
        total += 6.0 * tuning_of_blocks.epochs * tokens * weights * inputs
    total += 4.0 * weights * tokens + PANELS * 2.0 * tokens * sum(n * n for n in shape.inputs)
    quant = flags.get("quant", "ldlq")
    solve = 5.0 if quant != "ldlbal_admm" else 400.0
    recipe = recipe_of(recipe_flags(flags))
    passes = sum(x.passes for x in recipe.polish if isinstance(x, Greedy)) if recipe else 0
    rotated = bool(flags.get("incoh_processing") or flags.get("pre_proj"))
    for m, n in shape.matrices:
        total += (1.0 + 2.0 * passes) * m * n * n + _learning(recipe, m, n)
        total += (1.0 + passes) * _searching(recipe, m, n)
        total += solve * n**3 if rotated else solve * n**3 / 2  # inputs that are shared
    return total


def _learning(recipe: Recipe | None, m: int, n: int) -> float:
    """Operations that learned codebooks of a matrix take."""
    if recipe is None or not isinstance(recipe.codebook, Learned):
        return 0.0
    book = recipe.codebook
    steps = sum(polish.steps for polish in recipe.polish if isinstance(polish, UpdateCentroids))
    return 3.0 * 2**book.index_bits * book.iterations * m * n + 2.0 * steps * m * n * n


def _searching(recipe: Recipe | None, m: int, n: int) -> float:
    """Operations that finding the walks of a matrix on a trellis takes, once."""
    if recipe is None or not isinstance(recipe.codebook, Trellis):
        return 0.0
    return 6.0 * 2**recipe.codebook.states * m * n * max(1, len(recipe.trials))


def _bytes(cell: Cell, shape: Shape) -> float:
    """Weights, hidden states, Hessians of a block, and what the largest matrix works with."""
    s = cell.settings
    seqlen = s.seqlen or min(2048, shape.positions)
    wide = 4 if s.dtype in ("auto", "float32") else 2
    n = max(n for _, n in shape.matrices)
    hidden = s.nsamples * seqlen * shape.width * wide
    if cell.flags.get("wbits") == 16:
        hidden, n = 0, 0
    hessians = 8.0 * sum(size * size for size in shape.inputs) / shape.blocks
    return IMPORTS + shape.bytes * wide / 4 + hidden + hessians + 6 * 8.0 * n * n


@cache  # a hub out of reach is asked once
def _shape(model: str) -> Shape | str:
    """From the config alone, or why there is none. Models of the papers are known by heart."""
    known: Mapping[str, Any] | None = known_models().get(model)
    try:
        config = AutoConfig.for_model(**known["config"]) if known else read_config(model)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        names = coverage(empty).quantized
    except QuipError as error:
        return str(error)
    matrices = [tuple(empty.get_submodule(name).weight.shape) for name in names]
    _, blocks = find_blocks(empty)
    inputs = [n for name, (_, n) in zip(names, matrices, strict=True) if not name.endswith(SHARING)]
    text = config.get_text_config()
    return Shape(
        matrices=tuple((int(m), int(n)) for m, n in matrices),
        inputs=tuple(map(int, inputs)),
        head=text.vocab_size * text.hidden_size,
        bytes=module_bytes(empty),
        block_bytes=module_bytes(blocks[0]),
        blocks=len(blocks),
        width=text.hidden_size,
        positions=getattr(text, "max_position_embeddings", 2048),
    )


def _flops(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product: the best of five."""
    size = 1024
    A = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        (A @ A).sum().item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
