"""Cells that are measured on the Hessians of a model, collected once for all of them."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quip.collecting import Collection, collect_hessians
from quip.files import replacing
from quip.research.losses import Case, summarised
from quip.research.proxies import Asked as Proxies
from quip.research.proxies import measure_losses
from quip.research.summary import Asked as Statistics
from quip.research.summary import summarize
from quip.research.tables.cells import Cell, slug
from quip.run_folder import as_json

log = logging.getLogger(__name__)

COMPARED = ("quant", "wbits", "codebook", "incoh_processing")  # what one pass goes through


def run_proxies(cell: Cell, cells: Sequence[Cell]) -> None:
    """The losses of all cells that differ in method, bits and processing alone, in one pass."""
    together = [one for one in cells if _rest(one) == _rest(cell) and _store(one) == _store(cell)]
    s, cases = cell.settings, {one.folder: _case(one) for one in together}
    losses = measure_losses(
        Proxies(
            model=cell.model,
            store=collected(cell),
            quants=_each(case.quant for case in cases.values()),
            wbits=_each(case.wbits for case in cases.values()),
            processing=_each(case.processing for case in cases.values()),
            codebooks=_each(case.codebook for case in cases.values()),
            flags=_rest(cell),
            seed=s.seed,
            device=s.device,
            dtype=s.dtype,
            out=_store(cell).parent / f"losses-{_store(cell).name}-{_digest(_rest(cell))}",
            resume=True,
        )
    )
    found = {
        tuple(line[key] for key in vars(next(iter(cases.values())))): line
        for line in summarised(losses)
    }
    for one in together:
        line = found[tuple(vars(cases[one.folder]).values())]
        _write(one, {**line, "seconds": {"quantize": line["seconds"]}})


def run_statistics(cell: Cell, cells: Sequence[Cell]) -> None:
    """The means over all Hessians, as they are and after incoherence processing."""
    s = cell.settings
    found = summarize(
        Statistics(store=collected(cell), model=cell.model, seed=s.seed, device=s.device)
    ).as_json()
    means = {row["processing"]: row for row in found["hessian_means"] if row["role"] == "all"}
    for one in cells:
        if one.model == cell.model and _store(one) == _store(cell):
            stage = "rescaled and rotated" if one.flags.get("incoh_processing") else "original"
            _write(one, {"hessians": means[stage]})


def collected(cell: Cell) -> Path:
    """The store of the cell's model, collected where it is not yet."""
    s, store = cell.settings, _store(cell)
    collect_hessians(
        Collection(
            model=cell.model,
            dataset=s.dataset,
            save=store,
            nsamples=s.nsamples,
            seqlen=s.seqlen,
            seed=s.seed,
            device=s.device,
            dtype=s.dtype,
            resume=True,
        )
    )
    return store


def _store(cell: Cell) -> Path:
    s = cell.settings
    depends = [cell.model, s.dataset, s.nsamples, s.seqlen, s.seed, s.dtype]
    return cell.root / "hessians" / f"{slug(cell.model)}-{_digest(depends)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _case(cell: Cell) -> Case:
    flags = cell.flags
    return Case(
        quant=flags.get("quant", "ldlq"),
        codebook=flags.get("codebook", "int"),
        wbits=flags["wbits"],
        processing="incoherence" if flags.get("incoh_processing") else "baseline",
    )


def _rest(cell: Cell) -> dict[str, Any]:
    return {name: value for name, value in cell.flags.items() if name not in COMPARED}


def _each(values: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _write(cell: Cell, numbers: Mapping[str, Any]) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    report = {"model": cell.model, "flags": dict(cell.flags), "status": "complete", **numbers}
    with replacing(cell.folder / "run.json") as partial:
        partial.write_text(as_json(report))
