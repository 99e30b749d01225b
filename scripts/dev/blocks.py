"""Blocks of README.md and docs/ that scripts fill: `<!-- KIND WORDS -->` up to `<!-- end -->`."""

import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fill(kind: str, made: Callable[..., str], *, check: bool) -> list[str]:
    """Put made(*WORDS) into every block of a kind; the names of documents where it was stale.

    With `check` nothing is written.
    """
    marked = re.compile(rf"(<!-- {kind} ([^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
    stale = []
    for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text()
        after = marked.sub(lambda m: m[1] + made(*m[2].split()) + m[3], before)
        if after != before:
            stale.append(path.name)
            if not check:
                path.write_text(after)
    return stale
