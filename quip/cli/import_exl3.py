"""`quip import-exl3 DIR OUT`: a model in the layout of EXL3 as a checkpoint."""

import argparse
from pathlib import Path

from quip.cli.streams import say
from quip.cli.values import place

HELP = "make a checkpoint of a model that exllamav3 converted (EXL3)"
EXAMPLES = """
quip import-exl3 runs/llama-exl3 runs/llama-imported
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        metavar="DIR",
        help="a downloaded model, such as turboderp/Llama-3.2-1B-Instruct-exl3 at one of its bits",
    )
    add("out", type=Path, metavar="OUT", help="the folder to write; it must be new or empty")
    add(
        "--tokenizer",
        type=place,
        metavar="NAME",
        help="the hub id or folder of the original model, where DIR has no tokenizer",
    )
    add("--overwrite", action="store_true", help="let OUT be a folder that holds files: they go")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Import, and say what came of it."""
    from quip.data.reach import reach_hub
    from quip.jobs.report.text import size_words
    from quip.packed.exl3.read import import_exl3

    if args.tokenizer is not None and not Path(args.tokenizer).expanduser().exists():
        reach_hub(f"tokenizer {args.tokenizer}")
    made = import_exl3(args.folder, args.out, tokenizer=args.tokenizer, overwrite=args.overwrite)
    say(
        f"{args.out}: {size_words(made.file_bytes)}, {made.matrices} matrices of a trellis "
        f"({', '.join(made.codes)}; {made.bits:.4g} bits), a checkpoint that quip loads"
    )
