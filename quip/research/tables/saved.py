"""Cells of checkpoints: what one takes on the disk and in memory, and what a new process reads."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from quip.errors import Unavailable
from quip.evaluate.memory import resident_bytes
from quip.jobs.evaluate import Evaluation, run_evaluation
from quip.jobs.export import export_dense
from quip.jobs.inspect import inspect_checkpoint
from quip.packed.checkpoint import load, skeleton
from quip.research.tables.cells import Cell, Settings
from quip.research.tables.quantized import WORK, checkpoint_of

PROMPT = 200  # tokens whose logits are compared, at most


def run_saved(cell: Cell, cells: Sequence[Cell]) -> None:
    """Save, inspect, and load in new processes: packed, and dense in bfloat16 beside it."""
    folder, dense = checkpoint_of(cell), cell.folder / WORK / "dense"
    export_dense(folder, dense, dtype="bfloat16", overwrite=True)
    run = cell.source.report()
    known = ("fingerprint", "calibration", "evaluation", "device", "dtype", "seconds", "totals")
    cell.write(
        {
            **{key: run[key] for key in (*known, "perplexity", "tasks")},
            "saved": _sizes(folder, run),
            "memory": {
                name: _in_new_process(loading_bytes, str(path))
                for name, path in (("packed", folder), ("dense", dense))
            },
            **_in_new_process(measure_checkpoint, str(folder), cell.settings),
        }
    )
    cell.keep()


def _sizes(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of the file, and those that the bits reported by the run come to."""
    held, bits = inspect_checkpoint(folder), run["totals"]["bits_per_weight"]
    rest = held["bytes_by_kind"]["bias"] + held["bytes_by_kind"]["other"]
    reported = bits * held["quantized_weights"] / 8 + rest
    return {
        "file_bytes": held["file_bytes"],
        "reported_bytes": round(reported),
        "beyond_reported": held["file_bytes"] / reported - 1,
        "dense_bytes": run["checkpoint"]["dense_bytes"],
        "bits_per_weight": held["bits_per_weight"],
        "reported_bits_per_weight": bits,
    }


def measure_checkpoint(folder: str, settings: Settings) -> dict[str, Any]:
    """Perplexity, tokens per second, and whether from_pretrained and quip.load say the same."""
    ours, theirs = load(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = ours.config.get_text_config()
    length = min(PROMPT, text.max_position_embeddings)
    ids = (torch.arange(length).unsqueeze(0) + 100) % text.vocab_size
    with torch.no_grad():
        difference = (ours(ids).logits - theirs(ids).logits).abs().max().item()
    del ours, theirs
    s = settings
    report = run_evaluation(
        Evaluation(
            model=folder,
            datasets=s.evaluate,
            nsamples=s.eval_nsamples,
            seqlen=s.seqlen,
            device=s.device,
        )
    )
    speed = run_evaluation(Evaluation(model=folder, speed=True, device=s.device))["speed"]
    found = report["perplexity"]
    return {
        "reloaded": {
            "perplexity": found,
            "mean_perplexity": fmean(found.values()) if found else None,
            "logits_difference": difference,
        },
        "threads": torch.get_num_threads(),
        "speed": speed,
    }


def loading_bytes(folder: str) -> int:
    """By how much loading the model and one forward raise the resident memory of this process."""
    skeleton(Path(folder))  # its class is imported before, and counts for neither
    before = resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.arange(8).unsqueeze(0))
    return resident_bytes() - before


def _in_new_process(function: Callable[..., Any], *given: Any) -> Any:
    """What the function returns there: nothing that this process has loaded is in its memory."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *given).result()
    except BrokenProcessPool as error:
        raise Unavailable(
            f"{function.__name__}: its process ended without an answer, perhaps for want of memory"
        ) from error
