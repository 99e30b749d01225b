"""`quip import-quip-sharp DIR OUT`: a model published in the layout of QuIP# as a checkpoint."""

import argparse

from quip.cli.importing import add_folders, import_folder

HELP = "make a checkpoint of a model published in the layout of QuIP#"
EXAMPLES = """
quip import-quip-sharp runs/llama-published runs/llama-imported
"""
SUCH = "a downloaded Llama or Mistral, such as relaxml/Llama-2-7b-E8P-2Bit"


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add_folders(parser, such=SUCH)
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Import, and say what came of it."""
    from quip.packed.quip_sharp.read import import_quip_sharp

    import_folder(args, import_quip_sharp, lambda made: f"{made.codebook} ({made.bits} bits)")
