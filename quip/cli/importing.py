"""What the commands have in common that make a checkpoint of another layout."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quip.cli.streams import say
from quip.cli.values import place


def add_folders(parser: argparse.ArgumentParser, *, such: str) -> None:
    """Add DIR (help: what is taken, `such`), OUT, --tokenizer and --overwrite."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help=such)
    add("out", type=Path, metavar="OUT", help="the folder to write; it must be new or empty")
    add(
        "--tokenizer",
        type=place,
        metavar="NAME",
        help="the hub id or folder of the original model, where DIR has no tokenizer",
    )
    add("--overwrite", action="store_true", help="let OUT be a folder that holds files: they go")


def import_folder(
    args: argparse.Namespace, read: Callable[..., Any], told: Callable[[Any], str]
) -> None:
    """Import with `read`, and say how large it came out and what `told` says of its matrices."""
    from quip.data.reach import reach_hub
    from quip.jobs.report.text import size_words

    if args.tokenizer is not None and not Path(args.tokenizer).expanduser().exists():
        reach_hub(f"tokenizer {args.tokenizer}")
    made = read(args.folder, args.out, tokenizer=args.tokenizer, overwrite=args.overwrite)
    matrices = f"{made.matrices} matrices of {told(made)}"
    say(f"{args.out}: {size_words(made.file_bytes)}, {matrices}, a checkpoint that quip loads")
