"""The command line: `quip COMMAND ...`, one command a file."""

import argparse
from collections.abc import Sequence

from quip.cli import run
from quip.cli.door import guarded

COMMANDS = {"run": run}


def main(argv: Sequence[str] | None = None) -> int:
    """The `quip` command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="quip", description="Compress language models to 2, 3 and 4 bits per weight."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.build(commands.add_parser(name, help=command.SUMMARY))
    return guarded(parser, argv)
