"""What was felt, as a file: tensors under their keys, with a seal over all of them."""

import json
import logging
from pathlib import Path
from typing import Any, TypedDict

from quip.errors import Unavailable
from quip.model.ledger_files import damaged, read_sealed, write_sealed
from quip.model.sensitivity.found import Sensitivity
from quip.packed.files import naming_damage
from quip.reading import parse_json
from quip.shapes import check_shape

log = logging.getLogger(__name__)


class Words(TypedDict):
    """What the file says beside its tensors: the labels, and which of them are of windows."""

    kind: str
    windows: str


def write_felt(path: Path, found: Sensitivity) -> None:
    """Write all of it into one file, which appears when it is complete."""
    words = {"kind": found.kind, "windows": json.dumps([*found.windows])}
    write_sealed(path, {**found.windows, **found.sums}, words)


def read_felt(path: Path) -> Sensitivity:
    """What a file holds. Raises Unavailable, naming the remedy, for a file that is damaged."""
    tensors, words = read_sealed(path)
    with naming_damage(*damaged(path)):
        found: Any = words
        check_shape(found, Words)
        keys = parse_json(found["windows"], list[str])
        if missing := [key for key in keys if key not in tensors]:
            raise ValueError(f"{missing[0]!r} is missing")
        windows = {key: tensors.pop(key) for key in keys}
    return Sensitivity(kind=words["kind"], windows=windows, sums=tensors)


def kept_felt(path: Path) -> Sensitivity | None:
    """What a file holds; None where there is none, or where it is damaged, which is warned of."""
    if not path.exists():
        return None
    try:
        return read_felt(path)
    except Unavailable as error:
        if isinstance(error.__cause__, OSError):  # it may be whole
            raise
        log.warning("%s; the pass is repeated", error)
        return None
