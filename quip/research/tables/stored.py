"""Cells that are measured on the Hessians of a model, collected once for all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quip.codebooks.names import CODEBOOKS, INTEGERS
from quip.jobs.hessians import Collection, collect_hessians
from quip.jobs.requests import request
from quip.research.hessians.summary import SummaryRequest as Statistics
from quip.research.hessians.summary import summarize
from quip.research.losses.bench import ProxyBench as Proxies
from quip.research.losses.bench import measure_losses
from quip.research.losses.rows import Case, by_case, summarised
from quip.research.tables.cells import Cell, digest, identity, slug
from quip.research.tables.description import recipe_of

COMPARED = ("quant", "wbits", "codebook", "incoh_processing")  # what one pass goes through


def run_proxies(cell: Cell, cells: Sequence[Cell]) -> None:
    """The losses of all cells that differ in method, bits and processing alone, in one pass."""
    together = {
        _case(one): one
        for one in cells
        if _rest(one) == _rest(cell) and _store(one) == _store(cell)
    }
    s, recipes = cell.settings, {case: recipe_of(one.flags) for case, one in together.items()}
    bench = Proxies(
        model=cell.model,
        store=collected(cell),
        quants=(),
        flags=_rest(cell),
        seed=s.seed,
        device=s.device,
        dtype=s.dtype,
        out=cell.root / "losses" / f"{_store(cell).name}-{digest(_rest(cell))}",
        resume=True,
    )
    losses = measure_losses(bench, {case: r for case, r in recipes.items() if r is not None})
    for case, rows in by_case(losses).items():
        if case in together:
            [line] = summarised(rows)
            together[case].write({**line, "seconds": {"quantize": line["seconds"]}})


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
            one.write({"hessians": means[stage]})


def collected(cell: Cell) -> Path:
    """The store of the cell's model, collected where it is not yet."""
    store = _store(cell)
    collect_hessians(request(Collection, cell.settings, model=cell.model, save=store, resume=True))
    return store


def _store(cell: Cell) -> Path:
    s = cell.settings
    depends = [identity(cell.model), identity(s.dataset), s.nsamples, s.seqlen, s.seed, s.dtype]
    return cell.root / "hessians" / f"{slug(cell.model)}-{digest(depends)}"


def _case(cell: Cell) -> Case:
    flags, codebook = cell.flags, cell.flags.get("codebook", INTEGERS)
    return Case(
        quant=flags.get("quant", "ldlq"),
        codebook=codebook,
        wbits=CODEBOOKS[codebook].only_bits or flags["wbits"],
        processing="incoherence" if flags.get("incoh_processing") else "baseline",
    )


def _rest(cell: Cell) -> dict[str, Any]:
    """The flags that no case names."""
    return {name: value for name, value in cell.flags.items() if name not in COMPARED}
