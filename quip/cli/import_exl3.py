"""`quip import-exl3 DIR OUT`: a model in the layout of EXL3 as a checkpoint."""

import argparse

from quip.cli.importing import add_folders, import_folder

HELP = "make a checkpoint of a model that exllamav3 converted (EXL3)"
EXAMPLES = """
quip import-exl3 runs/llama-exl3 runs/llama-imported
"""
SUCH = "a downloaded model, such as turboderp/Llama-3.2-1B-Instruct-exl3 at one of its bits"


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add_folders(parser, such=SUCH)
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Import, and say what came of it."""
    from quip.packed.exl3.read import import_exl3

    import_folder(
        args,
        import_exl3,
        lambda made: f"a trellis ({', '.join(made.codes)}; {made.bits:.4g} bits)",
    )
