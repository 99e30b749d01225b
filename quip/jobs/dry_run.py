"""What a run will need, told before it is run: no weight is read, and nothing is kept.

Sizes come from the config and from the headers of files, rates from some two seconds of this
machine's work (quip/jobs/forecast). All processes are taken to be like this one, and each to have a
machine, or a device, like this one to itself.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quip.errors import UnsupportedModel
from quip.evaluate.memory import resident_bytes
from quip.jobs.forecast.rates import measured_rates, measured_rounding
from quip.jobs.forecast.shape import Shape, empty_model, shape_of
from quip.jobs.forecast.sizes import (
    Terms,
    copies_of,
    device_bytes,
    disk_bytes,
    host_bytes,
    of_weights,
    packed_size,
    works,
)
from quip.jobs.forecast.stages import Costs, rounding_of
from quip.jobs.forecast.weights import Weights, weights_of
from quip.jobs.requests import NO_WEIGHTS, Machine, Text
from quip.jobs.sensitivity import is_asked_for
from quip.matrix.recipe import Recipe
from quip.model.activations import Activations
from quip.model.device import choose_device, device_name, free_host_bytes
from quip.model.load import DTYPES, read_config
from quip.model.load_streamed import SHARE
from quip.model.plan import Plan
from quip.model.run import Shrinking
from quip.model.states import batch_size_for
from quip.model.tables import table_bits
from quip.model.tune import BlockTuning

RANKS = (1, 2, 4, 8)
PYDOC_TOKENS = 60_000
NAMED_TOKENS = 340_000  # of another named data set, as of WikiText-2's test split
LETTERS = 4  # of a token, in a file of text


@dataclass(frozen=True, kw_only=True)
class Question(Text, Machine):
    """What of a run, or of the collection of Hessians, decides what it needs."""

    model: str
    recipe: Recipe | Plan | None = None
    tuning: BlockTuning | None = None
    target_shrink: Shrinking = None
    head_bits: int | None = None
    hessians: Path | None = None  # a store, instead of calibration
    eval_datasets: tuple[str, ...] = ()
    eval_nsamples: int | None = None
    compare: bool = False
    save: Path | None = None
    out: Path | None = None
    activation_memory: float | None = None  # GB of hidden states; None: a quarter of what is free
    token_weights: str = NO_WEIGHTS
    collects: bool = False  # whether `save` is to be a store of Hessians


def foretell(asked: Question) -> dict[str, Any]:
    """Seconds by stage, bytes in memory and on the disk, bits; for some numbers of processes."""
    start = time.perf_counter()
    device = torch.device(choose_device(asked.device))
    config = read_config(asked.model)
    if getattr(config, "quantization_config", None) and (asked.recipe or asked.collects):
        raise UnsupportedModel(f"{asked.model} is quantized already; give the original")
    empty = empty_model(config)
    shape, dtype = shape_of(empty), DTYPES[asked.dtype]
    weights = weights_of(asked.model, shape.numbers)
    seqlen = asked.seqlen or min(2048, shape.positions)
    batch = batch_size_for(seqlen, empty, device)
    began, base = time.perf_counter() - start, resident_bytes()

    place = (asked.out or asked.save or Path()).resolve()
    rates = measured_rates(device, dtype, weights.path, place)
    names = [name for one in shape.inputs for name in one.names]
    recipes = Plan.of(asked.recipe).recipes(names) if asked.recipe else {}
    _check(shape, recipes)
    own = [*{id(recipe): recipe for recipe in recipes.values()}.values()]
    terms = _terms(asked, own, weights, seqlen, batch)
    roundings = [(recipe, measured_rounding(recipe, rates, device, dtype)) for recipe in own]
    found = {one: tuple(works(one, recipes)) if recipes else () for one in shape.inputs}
    every = [work for group in found.values() for work in group]
    sizes = [packed_size(work, rounding_of(work, roundings).spec) for work in every]
    packed = sum(nbytes for nbytes, _ in sizes)
    disk = _disk(asked, shape, terms, packed, sum(tensors for _, tensors in sizes))
    costs = Costs(
        shape=shape,
        terms=terms,
        rates=rates,
        works=found,
        roundings=roundings,
        start=began,
        packed=packed,
        written=disk.get("checkpoint", 0),
    )
    whole, free = shape.numbers * terms.wide, free_host_bytes()
    ways = [
        _way(costs, base, device, asked.activation_memory, ranks=ranks, streamed=streamed)
        for streamed in ((False, True) if weights.streams else (False,))
        for ranks in RANKS
        if ranks <= _units(terms)
    ]
    streams = asked.stream == "on" or (asked.stream == "auto" and SHARE * whole > free)
    return {
        "model": asked.model,
        "device": device_name(str(device)),
        "dtype": str(dtype).removeprefix("torch."),
        "matrices": len(shape.matrices),
        "weights": shape.weights,
        "weights_kept": shape.numbers - shape.weights,
        "bits_per_weight": 8 * packed / shape.weights if packed else None,
        "terms": asdict(terms),
        "rates": asdict(rates),
        "streams": bool(streams and weights.streams),
        "model_bytes": whole,
        "free_bytes": free,
        "disk_bytes": disk,
        "ways": ways,
    }


def _terms(
    asked: Question, recipes: Sequence[Recipe], weights: Weights, seqlen: int, batch: int
) -> Terms:
    windows = sum(_windows(asked, name, seqlen) for name in asked.eval_datasets)
    calibrates = asked.hessians is None and (asked.recipe is not None or asked.collects)
    return Terms(
        windows=asked.nsamples if calibrates else 0,
        seqlen=seqlen,
        batch=batch,
        wide=DTYPES[asked.dtype].itemsize,
        kept=weights.kept,
        evaluated=windows,
        eval_seqlen=seqlen,
        measures=1 + (asked.compare and asked.recipe is not None),
        dense_bytes=weights.nbytes,
        saves=asked.save is not None and not asked.collects,
        ledger=asked.out is not None or asked.collects,
        copies=copies_of(recipes),
        of_weights=of_weights(recipes),
        epochs=asked.tuning.epochs if asked.tuning else 0,
        streams=2 if asked.target_shrink else 1,
        feels=calibrates and is_asked_for(asked.token_weights, asked.recipe),
        weighs=calibrates and asked.token_weights != NO_WEIGHTS,
    )


def _windows(asked: Question, name: str, seqlen: int) -> int:
    """Windows of a data set: of a file, about as many as its size makes."""
    path = Path(name).expanduser()
    files = [path] if path.is_file() else [*path.rglob("*")] if path.is_dir() else []
    letters = sum(file.stat().st_size for file in files if file.is_file())
    known = PYDOC_TOKENS if name == "pydoc" else NAMED_TOKENS
    there = max(1, (letters // LETTERS or known) // seqlen)
    return min(there, asked.eval_nsamples or there)


def _check(shape: Shape, recipes: Mapping[str, Recipe]) -> None:
    """Raise UsageError, naming the matrix, where its recipe cannot do it."""
    for one in shape.inputs if recipes else ():
        for name, m in zip(one.names, one.rows, strict=True):
            recipes[name].check(m, one.columns, name)


def _units(terms: Terms) -> int:
    """Batches of windows, which ranks are dealt; a run without any is of one process."""
    return max(1, -(-terms.windows // terms.batch))


def _disk(asked: Question, shape: Shape, terms: Terms, packed: int, tensors: int) -> dict[str, int]:
    found = disk_bytes(shape, terms, packed, tensors)
    if asked.head_bits and "checkpoint" in found:
        tables = shape.head * min(2, shape.outside // shape.head)  # tied ones are one
        found["checkpoint"] -= int(
            tables * (terms.kept - table_bits(asked.head_bits, shape.width) / 8)
        )
    if asked.collects:
        sizes = [one.columns for one in shape.inputs]
        found["store"] = sum(4 * n * (n + 1) // 2 + 8 * n for n in sizes)
    return found


def _way(
    costs: Costs,
    base: int,
    device: torch.device,
    activation_memory: float | None,
    *,
    ranks: int,
    streamed: bool,
) -> dict[str, Any]:
    """One way to run it."""
    seconds = costs.seconds(ranks=ranks, streamed=streamed)
    cuda = device.type == "cuda"
    host = host_bytes(
        costs.shape,
        costs.terms,
        base=base,
        packed=costs.packed,
        streamed=streamed,
        ranks=ranks,
        cuda=cuda,
        free=free_host_bytes(),
        limit=Activations.within(activation_memory, None).limit,
    )
    return {
        "ranks": ranks,
        "streamed": streamed,
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "host_bytes": host,
        "device_bytes": device_bytes(costs.shape, costs.terms, ranks) if cuda else 0,
    }
