"""What the flags of a cell say of tuning, as QuIP# does it in two stages.

(a) tunes each block while it is quantized: `ft_epochs` and the other `--ft_*` of `quip run`.
(b) tunes the checkpoint that comes of it: `finetune`, the flags of `quip finetune` by name.
"""

from collections.abc import Mapping
from typing import Any

from quip.errors import UsageError
from quip.model.tune import BlockTuning, ModelTuning

FINETUNE, BLOCKWISE = "finetune", "ft_"
WINDOWS = "nsamples"  # of (b), if not those of the calibration


def recipe_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags without those of tuning: what a recipe is built from."""
    return {
        name: value
        for name, value in flags.items()
        if name != FINETUNE and not name.startswith(BLOCKWISE)
    }


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
