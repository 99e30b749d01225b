"""What the words of a line may be: numbers of a sensible size, and names that a system can look up.

A parser reads every int and every path by these, so that no flag has to ask.
"""

import os
from pathlib import Path

from quip.errors import UsageError, shown

MOST = 10**9  # of whatever is counted
SEEDS = 2**63  # torch's generators take no more
AUTO = "auto"
NAME_BYTES = 200  # of a file's 255: names of partial and temporary files are made from it


def whole(word: str) -> int:
    """A whole number below a thousand million, in absolute value. Raises ValueError."""
    value = _number(word)
    if abs(value) >= MOST:
        raise UsageError(f"{shown(word)} is too large: a number below {MOST:,} is needed")
    return value


def seed(word: str) -> int:
    """A whole number of at most 63 bits. Raises ValueError."""
    value = _number(word)
    if abs(value) >= SEEDS:
        raise UsageError(f"{shown(word)} is too large: a seed has at most 63 bits")
    return value


def share_or_auto(word: str) -> float | str:
    """A number from 0 to 1, or the word auto. Raises ValueError."""
    if word == AUTO:
        return word
    value = float(word)
    if not 0 <= value <= 1:
        raise UsageError(f"{shown(word)} is no share: a number from 0 to 1 is needed, or {AUTO}")
    return value


share_or_auto.__name__ = "number or auto"  # as argparse calls it where a word is none
seed.__name__ = int.__name__  # as argparse calls it where a word is none


def path(word: str) -> Path:
    """A path that a system can look up, whether or not there is anything."""
    return Path(place(word))


def place(word: str) -> str:
    """A name that may be one of a file: what no system can look up is refused here, once."""
    readable(word)
    try:
        found = Path(word).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UsageError(f"{shown(word)}: {error}") from error
    if any(len(os.fsencode(part)) > NAME_BYTES for part in found.parts):
        raise UsageError(f"{shown(word)}: a name of a file has at most {NAME_BYTES} bytes")
    try:
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a loop of links, a folder that is not ours
        raise UsageError(f"{shown(word)} cannot be looked up ({error.strerror})") from error
    return word


def readable(word: str) -> str:
    """Text that is UTF-8: Python keeps other bytes as surrogates, which no file or report takes."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{shown(word)} is not UTF-8 text: convert it first") from error
    return word


def bounded(line: str, most: int = 1000) -> str:
    """A line that a person can read: the middle of a longer one is left out."""
    return line if len(line) <= most else f"{line[: most - 200]}...{line[-180:]}"


def _number(word: str) -> int:
    readable(word)
    if len(word) > 40:  # more digits than Python converts raise an error of their own
        raise UsageError(f"{shown(word)} is no whole number of a sensible size")
    return int(word)
