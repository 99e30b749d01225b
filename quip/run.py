"""`python -m quip.run MODEL DATASET ...`: the door to quip/cli/run.py."""

import sys
from collections.abc import Sequence

from quip.cli import run
from quip.cli.parse import Parser, guarded


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m quip.run`. Returns the exit status."""
    parser = Parser(prog="quip.run", description=run.HELP.capitalize() + ".")
    run.build(parser)
    return guarded(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
