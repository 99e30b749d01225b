"""`quip export DIR OUT --dense | --quip-sharp | --gguf`: a checkpoint for other tools."""

import argparse
from pathlib import Path

from quip.cli.streams import say
from quip.errors import UsageError

HELP = "write a saved checkpoint in a form for other tools"
EXAMPLES = """
quip export runs/demo-2bit runs/demo-dense --dense
quip run meta-llama/Llama-2-7b-hf c4 --codebook E8P12 --range tensor --save runs/llama-e8p
quip export runs/llama-e8p runs/llama-published --quip-sharp
quip run meta-llama/Llama-2-7b-hf c4 --quant gptq --wbits 4 --groupsize 32 --save runs/llama-4bit
quip export runs/llama-4bit runs/llama-4bit.gguf --gguf
"""
FORMATS = ("dense", "quip_sharp", "gguf")


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="a folder written by `quip run ... --save DIR`")
    add(
        "out",
        type=Path,
        metavar="OUT",
        help="the folder to write, which must be new or empty; with --gguf a file",
    )
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
        "--gguf",
        action="store_true",
        help="a .gguf file for llama.cpp, packed as it is: a Llama, Mistral, Qwen2 or Qwen3 of "
        "integer grids in groups of 32, 64 ... inputs (--quant gptq --groupsize 32)",
    )
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights written by --dense; auto, the default, is what the checkpoint "
        "computes in",
    )
    add("--overwrite", action="store_true", help="let OUT be what holds files, or one: they go")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Export, and say what came of it."""
    formats = [name for name in FORMATS if getattr(args, name)]
    if not formats:
        raise UsageError(
            "export needs a format: add --dense for a plain Hugging Face one, --quip-sharp for "
            "the published layout of QuIP#, or --gguf for llama.cpp"
        )
    if len(formats) > 1:
        named = " and ".join(f"--{name.replace('_', '-')}" for name in formats)
        raise UsageError(f"{named} are two formats: leave one out")
    if args.quip_sharp and args.dtype not in ("auto", "float16"):
        raise UsageError(f"--dtype {args.dtype} with --quip-sharp: that layout is in float16")
    if args.gguf and args.dtype != "auto":
        raise UsageError(f"--dtype {args.dtype} with --gguf: each tensor there has its own type")

    from quip.jobs.export import export_dense, export_gguf, export_quip_sharp
    from quip.jobs.report.text import size_words

    if args.dense:
        size = export_dense(args.folder, args.out, dtype=args.dtype, overwrite=args.overwrite)
        what = "a plain folder that loads without quip"
    elif args.quip_sharp:
        size = export_quip_sharp(args.folder, args.out, overwrite=args.overwrite)
        what = "in the published layout of QuIP#"
    else:
        size, kinds = export_gguf(args.folder, args.out, overwrite=args.overwrite)
        what = ", ".join(f"{count} matrices of {kind}" for kind, count in kinds.items())
    say(f"{args.out}: {size_words(size)}, {what}")
