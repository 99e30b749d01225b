"""The values of flags as the parts of a recipe take them, with a note of who took which."""

from dataclasses import dataclass, replace
from typing import Any

from quip.errors import UsageError
from quip.matrix.flags import Flags


@dataclass(frozen=True)
class Take:
    """The values of flags for one part of a recipe, which is noted as their reader."""

    flags: Flags
    name: str
    readers: dict[str, str]  # of each flag that was read, the first

    def __call__(self, name: str) -> Any:
        self.readers.setdefault(name, self.name)
        return getattr(self.flags, name)

    def part(self, name: str) -> "Take":
        """The values of the same flags for a part of this name, which a refusal may speak of."""
        return replace(self, name=name)


def columns_of(range_: str, *, least: int) -> int | None:
    """The columns of --range that share a fit, a multiple of `least` of them; None: all."""
    if range_ == "tensor":
        return None
    if range_ == "column" and least == 1:
        return 1
    if range_.isdecimal() and int(range_) > 0 and int(range_) % least == 0:
        return int(range_)
    if least > 1:
        raise UsageError(f"--range {range_}: say tensor, or a multiple of {least} columns")
    raise UsageError(f"--range {range_}: say tensor, column or a number of columns")
