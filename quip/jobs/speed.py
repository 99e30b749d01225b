"""The speed of a model in a job, as it is and with dense matrices, each number written down."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quip.evaluate.speed import speed
from quip.jobs.report.report import Report
from quip.model.load import LoadedModel
from quip.model.records import Stopwatch
from quip.packed.checkpoint import to_dense
from quip.packed.linear import quantized_layers


def measure_speed(
    loaded: LoadedModel, report: Report, watch: Stopwatch, batches: Sequence[int]
) -> None:
    """The speed of the model as it is, and with dense matrices in place of its packed ones."""
    prompt = min(256, loaded.max_length // 2)
    new = min(32, loaded.max_length - prompt)
    packed = bool(quantized_layers(loaded.model))
    found: dict[str, Any] = {}
    for kind in ("packed", "dense") if packed else ("dense",):
        model = to_dense(loaded.model) if packed and kind == "dense" else loaded.model
        for batch in batches:
            with watch("speed"):
                measured = speed(
                    model, device=report.device, batch=batch, prompt_tokens=prompt, new_tokens=new
                )
            found[kind if batch == 1 else f"{kind}, {batch} texts"] = asdict(measured)
            report.save("evaluating", speed=found)
