"""What is known of a flag beside its name: its help, the type of its values, and which are none."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST = 10**9  # columns; no model comes near it
MOST_PASSES = 10_000


@dataclass(frozen=True, kw_only=True)
class Said:
    """What is known of a flag beside its name and default."""

    help: str
    group: str  # of the help
    kind: Callable[[str], Any] = str  # makes its value of a word; bool: a switch, without one
    metavar: str | None = None
    choices: Collection[Any] | None = None
    refuse: Callable[[Any], str | bool] | None = None  # what is wrong with a value, if anything


def flag(group: str, words: str, *, default: Any = None, **more: Any) -> Any:
    """A field of `Flags`; `more` is of `Said`. A switch is off unless it is said."""
    said = Said(help=words, group=group, **more)
    return field(default=False if said.kind is bool else default, metadata={"said": said})


def listed(rows: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}, {row.title}" for name, row in rows.items())


def number(word: str) -> int | float:
    """A number; a whole one is an int, and stands in a report as one."""
    value = float(word)
    return int(value) if value.is_integer() else value


def number_or_auto(word: str) -> float | str:
    """A number, where the word is one; what else is no good is refused with all other values."""
    try:
        return float(word)
    except ValueError:
        return word


def bad_passes(n: int) -> str | bool:
    if n > MOST_PASSES:
        return f"at most {MOST_PASSES:,} make sense: codes settle in tens of passes"
    return n < 0 and "it cannot be negative"


def bad_rho(x: float | str) -> str | bool:
    good = x == "auto" if isinstance(x, str) else 0 < x < math.inf
    return not good and "a positive number or auto is needed"


def bad_scale(x: float) -> str | bool:
    if isinstance(x, str) or not 0 < x < math.inf:
        return "a positive number is needed"
    return not 0.01 <= x <= 100 and "scales of lattices lie between 0.01 and 100"


def tile_of(word: str) -> tuple[int, int]:
    """The rows and columns of a tile, as in 256x1. Raises ValueError for what is none."""
    rows, columns = (int(x) if x.isascii() and x.isdecimal() else 0 for x in word.split("x"))
    if not (0 < rows < MOST and 0 < columns < MOST):
        raise ValueError(word)
    return rows, columns


def bad_tile(word: str) -> str | bool:
    try:
        return not tile_of(word)
    except (AttributeError, ValueError):
        return "rows x columns are needed, as in 256x1"


def as_line(flags: Mapping[str, Any]) -> list[str]:
    """The flags as they would stand on a command line, by the names of `Flags`."""
    words = []
    for name, value in flags.items():
        shown = name.rstrip("_")
        if isinstance(value, bool):
            words.append(f"--{shown}" if value else f"--no-{shown}")
        elif value is not None:
            words.append(f"--{shown}={value}")
    return words
