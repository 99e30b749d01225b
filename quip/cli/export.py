"""`quip export DIR OUT --dense | --quip-sharp`: a checkpoint as a folder for other tools."""

import argparse
from pathlib import Path

from quip.cli.streams import say
from quip.errors import UsageError

HELP = "write a saved checkpoint in a form for other tools"
EXAMPLES = """
quip export runs/demo-2bit runs/demo-dense --dense
quip run meta-llama/Llama-2-7b-hf c4 --codebook E8P12 --range tensor --save runs/llama-e8p
quip export runs/llama-e8p runs/llama-published --quip-sharp
"""


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
        "--quip-sharp",
        action="store_true",
        help="the published layout of QuIP#, packed as it is: a Llama or Mistral that was "
        "quantized with --codebook E8P12 (or E8P12RVQ3B, E8P12RVQ4B) --range tensor",
    )
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights written by --dense; auto, the default, is what the checkpoint "
        "computes in",
    )
    add("--overwrite", action="store_true", help="let OUT be a folder that holds files: they go")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Export, and say what came of it."""
    if not (args.dense or args.quip_sharp):
        raise UsageError(
            "export needs a format: add --dense for a plain Hugging Face one, or --quip-sharp for "
            "the published layout of QuIP#"
        )
    if args.dense and args.quip_sharp:
        raise UsageError("--dense and --quip-sharp are two formats: leave one out")
    if args.quip_sharp and args.dtype not in ("auto", "float16"):
        raise UsageError(f"--dtype {args.dtype} with --quip-sharp: that layout is in float16")

    from quip.jobs.export import export_dense, export_quip_sharp
    from quip.jobs.report.text import size_words

    if args.dense:
        size = export_dense(args.folder, args.out, dtype=args.dtype, overwrite=args.overwrite)
        what = "a plain folder that loads without quip"
    else:
        size = export_quip_sharp(args.folder, args.out, overwrite=args.overwrite)
        what = "in the published layout of QuIP#"
    say(f"{args.out}: {size_words(size)}, {what}")
