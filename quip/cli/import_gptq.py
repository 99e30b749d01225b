"""`quip import-gptq DIR OUT`: a model that GPTQ quantized elsewhere as a checkpoint."""

import argparse

from quip.cli.importing import add_folders, import_folder

HELP = "make a checkpoint of a model in a format of GPTQ (AutoGPTQ, GPTQModel)"
EXAMPLES = """
quip import-gptq runs/llama-gptq runs/llama-imported
"""
SUCH = "a downloaded model, such as TheBloke/Llama-2-7B-GPTQ"


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add_folders(parser, such=SUCH)
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Import, and say what came of it."""
    from quip.packed.gptq.read import import_gptq

    import_folder(args, import_gptq, lambda made: f"integers ({made.bits:.4g} bits)")
