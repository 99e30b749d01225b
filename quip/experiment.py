"""One run from names to numbers: load, calibrate, quantize, evaluate, and report on the way."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from quip.data import TokenSet, calibration_tokens, evaluation_tokens
from quip.errors import UsageError
from quip.evaluate.perplexity import perplexity
from quip.models import LoadedModel, check_seqlen, load_model
from quip.pipeline import Stopwatch, quantize_model
from quip.recipe import Recipe, describe
from quip.report import RunFolder, peak_memory, summary, versions
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
    device: str = "cpu"
    dtype: str = "auto"
    eval_datasets: tuple[str, ...] = ()
    eval_nsamples: int | None = None
    compare: bool = False
    out: Path | None = None
    overwrite: bool = False
    flags: Mapping[str, object] = field(default_factory=dict)  # as given, for the report


def run_experiment(experiment: Experiment) -> dict[str, Any]:
    """Run it and return the report, which `out` receives before and after each evaluation."""
    e, watch = experiment, Stopwatch()
    folder = RunFolder(e.out, overwrite=e.overwrite) if e.out else None
    with watch("load"):
        loaded = load_model(e.model, dtype=e.dtype)
        seqlen = e.seqlen or min(2048, loaded.max_length)
        check_seqlen(loaded, seqlen)
        check_weights(loaded.model)
        kept = coverage(loaded.model).kept
    with watch("data"):
        evaluations = _evaluation_sets(e, loaded, seqlen)
        calibration = e.recipe and calibration_tokens(
            e.dataset, loaded.tokenizer, nsamples=e.nsamples, seqlen=seqlen, seed=e.seed
        )
    report: dict[str, Any] = {
        "model": e.model,
        "dataset": e.dataset,
        "method": e.method,
        "flags": dict(e.flags),
        "recipe": e.recipe and describe(e.recipe),
        "seed": e.seed,
        "device": _device_name(e.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "versions": versions(),
        "calibration": calibration and _stamp(calibration),
        "evaluation": {name: _stamp(tokens) for name, tokens in evaluations.items()},
        "kept_matrices": list(kept),
        "status": "started",
        "seconds": watch.seconds,
    }

    def save(status: str) -> None:
        report.update(status=status, peak_memory=peak_memory(e.device))
        if folder:
            folder.write_report(report)

    save("started")
    if e.recipe and e.compare:
        for name in evaluations:
            _evaluate(name, evaluations, loaded, e, watch, report, "original_perplexity")
            save("original evaluated")
    if e.recipe and calibration:
        records = quantize_model(
            loaded.model,
            calibration.ids,
            e.recipe,
            device=e.device,
            seed=e.seed,
            watch=watch,
            batch_size=max(1, TOKENS_PER_BATCH // seqlen),
        )
        report["totals"] = summary(records)
        report["matrices"] = [asdict(record) for record in records]
        if folder:
            folder.write_layers(records)
        save("quantized")
    for name in evaluations:
        _evaluate(name, evaluations, loaded, e, watch, report, "perplexity")
        save("evaluated in part")
    save("complete")
    return report


def _evaluation_sets(e: Experiment, loaded: LoadedModel, seqlen: int) -> dict[str, TokenSet]:
    return {
        name: evaluation_tokens(name, loaded.tokenizer, seqlen=seqlen, nsamples=e.eval_nsamples)
        for name in e.eval_datasets
    }


def _evaluate(
    name: str,
    evaluations: Mapping[str, TokenSet],
    loaded: LoadedModel,
    e: Experiment,
    watch: Stopwatch,
    report: dict[str, Any],
    key: str,
) -> None:
    with watch("evaluate"):
        value = perplexity(loaded.model, evaluations[name].ids, device=e.device, progress=True)
    report.setdefault(key, {})[name] = value
    log.info("%s: perplexity %.4f on %s", key, value, name)


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
    """The device asked for, or cuda if there is one. Raises UsageError if it is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: {reason}; say cpu, or leave it out") from error
    return name


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device
