"""Columns of text, and lists of names and numbers as one word."""

from collections.abc import Sequence

from quip.errors import UsageError


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
    """A,B,... as a tuple. Raises UsageError if there is none."""
    found = tuple(filter(None, text.split(",")))
    if not found:
        raise UsageError(f"{flag} {text!r}: name one or more, as in {flag} A,B")
    return found


def numbers(text: str, flag: str, *, least: int, most: int | None = None) -> tuple[int, ...]:
    """A,B,... as whole numbers. Raises UsageError for what is none, or out of range."""
    found = []
    for word in text.split(","):
        value = int(word) if word.strip().isdecimal() else least - 1
        if value < least or (most is not None and value > most):
            span = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise UsageError(f"{flag} {text}: {word!r} is no whole number {span}")
        found.append(value)
    return tuple(found)
