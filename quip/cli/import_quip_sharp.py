"""`quip import-quip-sharp DIR OUT`: a model published in the layout of QuIP# as a checkpoint."""

import argparse
from pathlib import Path

from quip.cli.streams import say
from quip.cli.values import place

HELP = "make a checkpoint of a model published in the layout of QuIP#"
EXAMPLES = """
quip import-quip-sharp runs/llama-published runs/llama-imported
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        metavar="DIR",
        help="a downloaded Llama or Mistral, such as relaxml/Llama-2-7b-E8P-2Bit",
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
    from quip.packed.quip_sharp.read import import_quip_sharp

    if args.tokenizer is not None and not Path(args.tokenizer).expanduser().exists():
        reach_hub(f"tokenizer {args.tokenizer}")
    made = import_quip_sharp(
        args.folder, args.out, tokenizer=args.tokenizer, overwrite=args.overwrite
    )
    say(
        f"{args.out}: {size_words(made.file_bytes)}, {made.matrices} matrices of {made.codebook} "
        f"({made.bits} bits), a checkpoint that quip loads"
    )
