"""`quip import-compressed-tensors DIR OUT`: a model of llm-compressor as a checkpoint."""

import argparse

from quip.cli.importing import add_folders, import_folder

HELP = "make a checkpoint of a model in compressed-tensors' pack-quantized (llm-compressor)"
EXAMPLES = """
quip import-compressed-tensors runs/llama-w4a16 runs/llama-imported
"""
SUCH = "a downloaded model, such as RedHatAI/Llama-3.2-1B-Instruct-quantized.w4a16"


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add_folders(parser, such=SUCH)
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Import, and say what came of it."""
    from quip.packed.compressed_tensors.read import import_compressed_tensors

    import_folder(args, import_compressed_tensors, lambda made: f"integers ({made.bits:.4g} bits)")
