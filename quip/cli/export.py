"""`quip export DIR OUT --dense`: a checkpoint as a folder that any tool reads without quip."""

import argparse
from pathlib import Path

from quip.errors import UsageError

SUMMARY = "write a saved checkpoint in a form for other tools"


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="a folder written by `quip run ... --save DIR`")
    add("out", type=Path, metavar="OUT", help="the folder to write; it must be new or empty")
    add(
        "--dense",
        action="store_true",
        help="a plain Hugging Face folder: every quantized matrix multiplied out, so that the "
        "model takes as much room as the original",
    )
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights written; auto, the default, is what the checkpoint computes in",
    )
    add("--overwrite", action="store_true", help="let OUT be a folder that holds files: they go")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Export, and say what came of it."""
    if not args.dense:
        raise UsageError("export knows one format so far: add --dense for a plain Hugging Face one")

    from quip.card import size_words
    from quip.export import export_dense

    size = export_dense(args.folder, args.out, dtype=args.dtype, overwrite=args.overwrite)
    print(f"{args.out}: {size_words(size)}, a plain folder that loads without quip")
