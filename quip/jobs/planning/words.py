"""A plan as the text of a file: what deviates, matrix by matrix, then the commonest recipe."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from quip.jobs.plan import HEAD
from quip.jobs.planning.choices import Choice


def plan_text(
    rows: Sequence[tuple[tuple[str, ...], Choice]],
    line: str,
    bits: float,
    head: tuple[int, float] | None = None,
) -> tuple[dict[str, Mapping[str, Any]], str]:
    """The plan of these patterns and their choices, as `build_plan` takes it, and as YAML.

    With a row of embedding and head: their bits, and bits per weight of all together.
    """
    counts = Counter(choice.width for patterns, choice in rows for _ in patterns)
    usual = max(counts, key=counts.__getitem__)
    words: dict[str, Mapping[str, Any]] = {
        pattern: choice.flags
        for patterns, choice in rows
        for pattern in patterns
        if choice.width != usual
    }
    words["*"] = next(choice.flags for _, choice in rows if choice.width == usual)
    comments = [f"# {line}", f"# {bits:.4f} bits per weight are stored of the matrices"]
    own = []
    if head:
        own = [f"{HEAD}: {head[0]}"]
        comments.append(f"# {head[1]:.4f} of matrices, embedding and head together")
    lines = [f"{_quoted(pattern)}: {_inline(flags)}" for pattern, flags in words.items()]
    return words, "\n".join([*comments, *own, *lines]) + "\n"


def _inline(flags: Mapping[str, Any]) -> str:
    options: dict[str, Any] = {"default_flow_style": True, "width": 10**6, "sort_keys": False}
    return yaml.safe_dump(dict(flags), **options).strip()


def _quoted(pattern: str) -> str:
    return json.dumps(pattern)  # which YAML reads
