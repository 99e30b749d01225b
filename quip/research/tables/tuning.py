"""What the flags of a cell say that is of no recipe: of tuning, and of what a run looks at.

Tuning is done in two stages, as QuIP# does it:

(a) tunes each block while it is quantized: `ft_epochs` and the other `--ft_*` of `quip run`.
(b) tunes the checkpoint that comes of it: `finetune`, the flags of `quip finetune` by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from quip.errors import UsageError, shown
from quip.model.tune import BlockTuning, ModelTuning

FINETUNE, BLOCKWISE = "finetune", "ft_"
WINDOWS = "nsamples"  # of (b), if not those of the calibration
RUN: Mapping[str, Callable[[Any], bool]] = {
    "token_weights": ("none", "fisher", "labels").__contains__,
    "target_shrink": lambda x: x == "auto" or (isinstance(x, int | float) and 0 <= x <= 1),
    "two_sided": lambda x: isinstance(x, bool),
}


def recipe_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a recipe is built from: without those of tuning and of a run."""
    return {
        name: value
        for name, value in flags.items()
        if name != FINETUNE and name not in RUN and not name.startswith(BLOCKWISE)
    }


def run_options(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What a run looks at beside the inputs of matrices, by the names of `Experiment`.

    Raises UsageError for values that mean nothing.
    """
    found = {name: value for name, value in flags.items() if name in RUN}
    for name, value in found.items():
        if not RUN[name](value):
            raise UsageError(f"{name} {shown(value)}: `quip run --help` says what it may be")
    return found


def block_tuning(flags: Mapping[str, Any]) -> BlockTuning | None:
    """(a), or None. Raises UsageError for rates without epochs, TypeError for unknown names."""
    given = {
        name.removeprefix(BLOCKWISE): value
        for name, value in flags.items()
        if name.startswith(BLOCKWISE)
    }
    if given and not given.get("epochs"):
        raise UsageError(f"{BLOCKWISE}{next(iter(given))} speaks of fine-tuning: add ft_epochs")
    return BlockTuning(**given) if given else None


def model_tuning(flags: Mapping[str, Any]) -> tuple[ModelTuning, int | None] | None:
    """(b) and its windows (None: as many as the calibration has), or None.

    Raises UsageError for numbers that mean nothing, TypeError for unknown names.
    """
    if FINETUNE not in flags:
        return None
    given = dict(flags[FINETUNE] or {})
    windows = given.pop(WINDOWS, None)
    return ModelTuning(**given), windows
