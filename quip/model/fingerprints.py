"""What changed from one fingerprint of a run, or of a model, to another."""

from collections.abc import Iterator, Mapping
from typing import Any

from quip.errors import short

CHANGES = 10  # that are named


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed from one fingerprint to another, by dotted name; empty if nothing did."""
    found = list(_changes(before, now, ""))
    more = [f"{len(found) - CHANGES} more"] if len(found) > CHANGES else []
    return "; ".join(found[:CHANGES] + more)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in [*before, *(key for key in now if key not in before)]:
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _changes(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{short(f'{prefix}{key}')} was {short(a)}, is now {short(b)}"
