"""Fill in what README.md and docs/ say of the code: commands, flags, the tree, numbers of results/.

    python scripts/dev/render_docs.py           (--check: change nothing; exit 1 if one is stale)

A block `<!-- docs NAME ... -->` up to `<!-- end -->` holds what `BLOCKS[NAME]` makes of the words
behind it. The plot docs/perplexity.svg is drawn by draw_perplexity.py, which needs matplotlib;
here only the digest in it is compared.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence

import house
from blocks import ROOT, fill
from commands import command, commands
from headline import demo, glance, headline
from measured import digest

BLOCKS: dict[str, Callable[..., str]] = {
    "command": command,
    "commands": commands,
    "demo": demo,
    "files": house.files,
    "glance": glance,
    "headline": headline,
    "rooms": house.rooms,
    "tree": house.tree,
}


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    check = parser.parse_args(argv).check
    stale = fill("docs", lambda name, *words: BLOCKS[name](*words), check=check)
    if _drawn() != digest():
        stale.append("perplexity.svg (python scripts/dev/draw_perplexity.py)")
    print("stale: " + ", ".join(stale) if stale else "all documents are up to date")
    return int(check and bool(stale))


def _drawn() -> str | None:
    """What the plot says that it was drawn from."""
    plot = ROOT / "docs" / "perplexity.svg"
    found = re.search(r"drawn from (\w+)", plot.read_text()) if plot.exists() else None
    return found and found[1]


if __name__ == "__main__":
    sys.exit(main())
