"""The errors that a user meets: one line each, with the value and the remedy."""

import math


def one_line(error: Exception) -> str:
    """What an error of a library says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def how_to_install(extra: str = "") -> str:
    """What to type for this package, or an optional part of it, until it is on the index."""
    what = f"'.[{extra}]'" if extra else "."
    return f"pip install -e {what} (in a checkout of quip)"


def shown(value: object) -> str:
    """A foreign value as one line of at most 200 characters, for a message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}"


def short(text: object) -> str:
    """Foreign text as it is, or as `shown` where it has more than 200 characters."""
    return str(text) if len(str(text)) <= 200 else shown(text)


class QuipError(Exception):
    """Something outside the program is in the way. The command line prints it and exits with 1."""


class UsageError(QuipError, ValueError):
    """What was asked for means nothing. The command line prints it and exits with 2."""


class NotPositiveDefinite(QuipError):
    """A Hessian whose Cholesky factorisation fails even after damping."""


class NonFinite(QuipError):
    """NaN or infinity in weights, activations or a measure; the message names the place."""


class UnsupportedModel(QuipError):
    """A model whose weights this project would have to leave untouched without being asked to."""


class Unavailable(QuipError):
    """A model, dataset or file that cannot be found, reached or read."""


def finite(value: float, what: str) -> float:
    """The value of a measure. Raises NonFinite, which names `what` was measured, if it is none."""
    if not math.isfinite(value):
        raise NonFinite(f"{what} is {value}: give --dtype float32, or more bits")
    return value
