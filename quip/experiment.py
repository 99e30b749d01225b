"""One run from names to numbers: load, calibrate, quantize, evaluate, and report on the way."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quip.data import TokenSet, calibration_tokens, check_dataset, evaluation_tokens
from quip.errors import UnsupportedModel, UsageError
from quip.evaluate.perplexity import perplexity
from quip.models import LoadedModel, load_model
from quip.pipeline import MatrixRecord, Stopwatch, quantize_matrix_by_matrix
from quip.recipe import Recipe, describe
from quip.report import Report, RunFolder, versions
from quip.walk import check_weights, coverage

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096  # enough for full matrix products, little enough for any memory


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that one run depends on."""

    model: str
    dataset: str
    recipe: Recipe | None  # None evaluates the model as it is
    method: str = "unquantized"  # the recipe in a person's words
    nsamples: int = 128
    seqlen: int | None = None  # None: the model's positions, at most 2048
    seed: int = 0
    device: str | None = None  # None: cuda if there is one
    dtype: str = "auto"
    eval_datasets: tuple[str, ...] = ()
    eval_nsamples: int | None = None
    compare: bool = False
    out: Path | None = None
    overwrite: bool = False
    flags: Mapping[str, object] = field(default_factory=dict)  # as given, for the report


def run_experiment(experiment: Experiment) -> dict[str, Any]:
    """Run it and return the report, which `out` receives before and after each long stage.

    What is asked for is checked first, as far as it can be known without the model. A run that
    fails leaves a report of what it had reached, and of the reason.
    """
    e, watch = experiment, Stopwatch()
    folder, device = _check(e)
    with watch("load"):
        loaded = load_model(e.model, dtype=e.dtype, seqlen=e.seqlen)
        kept = _check_model(loaded)
    with watch("data"):
        calibration, evaluations = _token_sets(e, loaded)
    entries = _entries(e, loaded, device) | {
        "calibration": calibration and _stamp(calibration),
        "evaluation": {name: _stamp(tokens) for name, tokens in evaluations.items()},
        "kept_matrices": list(kept),
        "seconds": watch.seconds,
    }
    report = Report(entries, folder=folder, device=device)
    report.save("started")
    with report.kept():
        if e.compare and e.recipe:
            _evaluate("original_perplexity", evaluations, loaded, report, watch)
        if calibration and e.recipe:
            _quantize(e.recipe, calibration, e.seed, loaded, report, watch)
        _evaluate("perplexity", evaluations, loaded, report, watch)
        report.save("complete")
    return report.entries


def _check(e: Experiment) -> tuple[RunFolder | None, str]:
    """Whatever can be refused at once; the run's folder, not made yet, and its device."""
    folder = RunFolder(e.out, overwrite=e.overwrite) if e.out else None
    device = choose_device(e.device)
    check_dataset(e.dataset, "calibration")
    for name in e.eval_datasets:
        check_dataset(name, "evaluation")
    return folder, device


def _check_model(loaded: LoadedModel) -> tuple[str, ...]:
    """The matrices that stay as they are, in a model whose others can all be quantized."""
    covered = coverage(loaded.model)
    if not covered.quantized:
        raise UnsupportedModel(
            f"{loaded.name}: its blocks hold no nn.Linear to quantize; give another model"
        )
    check_weights(loaded.model)
    return covered.kept


def _token_sets(e: Experiment, loaded: LoadedModel) -> tuple[TokenSet | None, dict[str, TokenSet]]:
    """What to calibrate on, unless nothing is quantized, and what to evaluate on."""
    seqlen = e.seqlen or min(2048, loaded.max_length)
    evaluations = {
        name: evaluation_tokens(name, loaded.tokenizer, seqlen=seqlen, nsamples=e.eval_nsamples)
        for name in e.eval_datasets
    }
    if e.recipe is None:
        return None, evaluations
    calibration = calibration_tokens(
        e.dataset, loaded.tokenizer, nsamples=e.nsamples, seqlen=seqlen, seed=e.seed
    )
    return calibration, evaluations


def _entries(e: Experiment, loaded: LoadedModel, device: str) -> dict[str, Any]:
    """What the report says of the request and the machine."""
    return {
        "model": e.model,
        "dataset": e.dataset,
        "method": e.method,
        "flags": dict(e.flags),
        "recipe": e.recipe and describe(e.recipe),
        "seed": e.seed,
        "device": _device_name(device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def _quantize(
    recipe: Recipe,
    calibration: TokenSet,
    seed: int,
    loaded: LoadedModel,
    report: Report,
    watch: Stopwatch,
) -> None:
    records: list[MatrixRecord] = []
    try:
        for record in quantize_matrix_by_matrix(
            loaded.model,
            calibration.ids,
            recipe,
            device=report.device,
            seed=seed,
            watch=watch,
            batch_size=max(1, TOKENS_PER_BATCH // calibration.seqlen),
        ):
            records.append(record)
    finally:
        if records:
            report.save_matrices("quantized", records)


def _evaluate(
    key: str,
    evaluations: Mapping[str, TokenSet],
    loaded: LoadedModel,
    report: Report,
    watch: Stopwatch,
) -> None:
    found: dict[str, float] = {}
    bar = sys.stderr.isatty()
    for name, tokens in evaluations.items():
        with watch("evaluate"):
            value = perplexity(loaded.model, tokens.ids, device=report.device, progress=bar)
        found[name] = value
        log.info("%s: %s %.4f", name, key.replace("_", " "), value)
        report.save("evaluating", **{key: found})


def _stamp(tokens: TokenSet) -> dict[str, Any]:
    """What a perplexity depends on, beside the model."""
    return {
        "dataset": tokens.dataset,
        "split": tokens.split,
        "join": tokens.join,
        "windows": len(tokens.ids),
        "seqlen": tokens.seqlen,
        "sha256": tokens.sha256,
    }


def choose_device(name: str | None) -> str:
    """The device asked for, or cuda if there is one. Raises UsageError if it cannot compute."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        if "device type at start of device string" in reason:
            reason = "no such kind of device"
        raise UsageError(f"--device {name}: {reason}; say cpu, or leave it out") from error
    return name


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device
