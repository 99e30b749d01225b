"""Columns of text, and lists of names and numbers as one word."""

from collections.abc import Sequence

from quip.cli.values import MOST, place
from quip.errors import UsageError, shown


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns under one another: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    )


def names(text: str, flag: str) -> tuple[str, ...]:
    """A,B,... as a tuple. Raises UsageError if there is none, or one that cannot be looked up."""
    found = tuple(filter(None, text.split(",")))
    if not found:
        raise UsageError(f"{flag} {shown(text)}: name one or more, as in {flag} A,B")
    for word in found:
        try:
            place(word)
        except UsageError as error:
            raise UsageError(f"{flag}: {error}") from error
    return found


def numbers(text: str, flag: str, *, least: int, most: int = MOST) -> tuple[int, ...]:
    """A,B,... as whole numbers. Raises UsageError for what is none, or out of range."""
    found = []
    for word in text.split(","):
        # Of more digits than Python converts it is enough to know that they are many.
        digits = word if len(word) <= 20 else str(MOST + 1)
        value = int(digits) if word.strip().isdecimal() else least - 1
        if not least <= value <= most:
            open_ended = most == MOST and value < least
            span = f"of at least {least}" if open_ended else f"from {least} to {most:,}"
            raise UsageError(f"{flag}: {shown(word)} is no whole number {span}")
        found.append(value)
    return tuple(found)
