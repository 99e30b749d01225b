"""Everything that one run depends on, and what its report says of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quip.data.hessians import HessianStore
from quip.errors import UsageError
from quip.evaluate.zeroshot import ZeroShot
from quip.jobs.requests import (
    NO_SIDES_OF_A_STORE,
    NO_TARGET_OF_A_STORE,
    Calibration,
    Machine,
    Place,
)
from quip.matrix.recipe import Recipe
from quip.model.device import device_name
from quip.model.load import LoadedModel
from quip.model.plan import Plan, described
from quip.model.records import versions
from quip.model.run import Shrinking
from quip.model.tune import BlockTuning


@dataclass(frozen=True, kw_only=True)
class Experiment(Calibration, Machine, Place):
    """Everything that one run depends on."""

    model: str
    dataset: str | None  # None: that of the store
    recipe: Recipe | Plan | None  # of all matrices, or of each; None: the model as it is
    tuning: BlockTuning | None = None  # of each block, while it is quantized
    target_shrink: Shrinking = None  # how much targets make up for errors of the blocks before
    two_sided: bool = False  # whether matrices are rounded by what the loss feels of outputs, too
    hessians: Path | None = None  # a store of them, instead of calibration
    load: str | None = None  # a checkpoint of the model, evaluated in its place
    method: str = "unquantized"  # the recipe in a person's words
    head_bits: int | None = None  # of embedding and head; None: they stay as they are
    eval_datasets: tuple[str, ...] = ()
    eval_nsamples: int | None = None
    tasks: ZeroShot | None = None
    batch_size: int = 8  # of tasks
    compare: bool = False
    activation_memory: float | None = None  # GB of hidden states; None: a quarter of what is free
    save: Path | None = None  # the checkpoint
    resume: bool = False  # the run in `out`, which holds the report and the finished blocks
    flags: Mapping[str, object] = field(default_factory=dict)  # as given, for the report


def settled(e: Experiment) -> Experiment:
    """The experiment with the data set of its store. Raises UsageError unless it has one source."""
    if (e.dataset is None) == (e.hessians is None):
        raise UsageError("give a data set to calibrate on or a store (--hessians), and not both")
    if e.hessians is None:
        return e
    if e.two_sided:
        raise UsageError(NO_SIDES_OF_A_STORE)
    if e.target_shrink:
        raise UsageError(NO_TARGET_OF_A_STORE.format(shrink=e.target_shrink))
    if e.tuning:
        raise UsageError(
            "--hessians with --ft_epochs: tuning needs activations, of which a store has only the "
            "second moments; give DATASET instead, or leave out --ft_epochs"
        )
    return replace(e, dataset=HessianStore(e.hessians).manifest["calibration"]["dataset"])


def entries_of(e: Experiment, loaded: LoadedModel, device: str) -> dict[str, Any]:
    """What the report says of the request and the machine."""
    return {
        "model": e.model,
        "dataset": e.dataset,
        "hessians": e.hessians and str(e.hessians),
        "method": e.method,
        "flags": dict(e.flags),
        **described(e.recipe),
        "tuning": e.tuning and asdict(e.tuning),
        **({"target_shrink": e.target_shrink} if e.target_shrink else {}),
        **({"two_sided": True} if e.two_sided else {}),
        "seed": e.seed,
        "device": device_name(device),
        "dtype": loaded.dtype_name,
        "versions": versions(),
    }
