"""What files hold against what a model needs: what is missing, and what is left over."""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

from quip.errors import Unavailable, short

log = logging.getLogger(__name__)

NUMBER = re.compile(r"\.\d+\b")  # of a block


def lacking(model: Any, held: Collection[str]) -> list[str]:
    """What a PreTrainedModel needs, and files with these names do not have; tied tensors once."""
    spared = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [
        name
        for name in model.state_dict().keys() - set(held) - model.all_tied_weights_keys.keys()
        if not any(pattern.search(name) for pattern in spared)
    ]


def refuse_gaps(name: str, info: Mapping[str, Any], needed: Collection[str]) -> None:
    """Raise Unavailable where a model is not what its files hold: transformers only warns of it.

    Nothing that is needed may be missing or of another shape. What is left over is logged, such as
    the masks that older versions saved, unless it says that config.json is of another model.
    """
    left = set(info.get("unexpected_keys") or ())
    wrong = {**info, "unexpected_keys": _contradictions(left, needed)}
    for kind, keys in wrong.items():
        if keys:
            raise Unavailable(
                f"{name}: the checkpoint does not fit its config.json: {len(keys)} "
                f"{kind.replace('_', ' ')} such as {short(min(map(str, keys)))}; download it again"
            )
    if left:
        log.warning(
            "%s: left out %d entries of its files that the model has no use for, such as %s",
            *(name, len(left), short(min(left))),
        )


def _contradictions(left: Collection[str], needed: Collection[str]) -> set[str]:
    """What is left over of a module that the model has, or of a block more than it has.

    A bias, or the step of a packed matrix, would change what a module computes.
    """
    modules = {key.rpartition(".")[0] for key in needed}
    places = {NUMBER.sub(".*", key) for key in needed}
    return {
        key for key in left if key.rpartition(".")[0] in modules or NUMBER.sub(".*", key) in places
    }
