"""What the commands share that measure the theory and need no model."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quip.cli.output import numbers
from quip.cli.parse import as_given
from quip.cli.streams import say
from quip.errors import UsageError
from quip.files import check_new

MOST_NUMBERS = 100_000_000  # of a matrix in float64: 800 MB, of which several are needed


def columns(parser: argparse.ArgumentParser, default: str) -> None:
    words = f"columns of W (default {default})"
    parser.add_argument("--n", default=default, metavar="A,B,...", help=words)


def rows_flag(parser: argparse.ArgumentParser, default: int | None) -> None:
    parser.add_argument(
        "--rows",
        type=_rows,
        default=default,
        metavar="N",
        help=f"rows of W; n for as many as columns (default {default or 'n'})",
    )


def _rows(word: str) -> int | None:
    """None for `n`."""
    try:
        return None if word == "n" else numbers(word, "--rows", least=1)[0]
    except UsageError as error:  # argparse would put words of its own in its place
        raise argparse.ArgumentTypeError(str(error).removeprefix("--rows: ")) from error


def refuse_sizes(sizes: Sequence[int], rows: int | None) -> None:
    """Raise UsageError for matrices too large to measure: W of rows (None: n) by n, H of n by n."""
    for n in sizes:
        if (most := max(n, rows or n)) * n > MOST_NUMBERS:
            raise UsageError(
                f"--n {n}: a matrix of {most:,} x {n:,} is beyond {MOST_NUMBERS:,} numbers, which "
                "take hours and gigabytes: give fewer"
            )


def output_flags(parser: argparse.ArgumentParser, *, files: str) -> None:
    add = parser.add_argument
    add("--json", action="store_true", help="print the rows and the settings as JSON")
    add("--out", type=Path, metavar="DIR", help=f"a new or empty folder for {files}")
    add("--overwrite", action="store_true", help="write where files are: --out loses them")


def check_output(args: argparse.Namespace) -> None:
    """Raise UsageError for a folder that could not be written, before anything is measured."""
    if args.out is not None:
        check_new(args.out, "--out", overwrite=args.overwrite)
    elif args.overwrite:
        raise UsageError("--overwrite speaks of a folder: name one with --out DIR")


def write_and_print(
    args: argparse.Namespace,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    text: Callable[[], str],
    plots: Mapping[str, Callable[[Path], None]],
) -> None:
    """Write what --out asks for, and print the table or, with --json, the rows."""
    from quip.jobs.report.folder import as_json
    from quip.model.records import versions
    from quip.research.theory.output import write_results

    settings = {"flags": as_given(args), "versions": versions()}
    if args.out:
        write_results(
            args.out, name, rows, settings=settings, plots=plots, overwrite=args.overwrite
        )
    say(as_json({**settings, "rows": rows}).rstrip() if args.json else text())
