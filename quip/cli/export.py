"""`quip export DIR OUT --dense | --gguf | ...`: a checkpoint for other tools."""

import argparse
from pathlib import Path

from quip.cli.streams import say
from quip.errors import UsageError

HELP = "write a saved checkpoint in a form for other tools"
EXAMPLES = """
quip export runs/demo-2bit runs/demo-dense --dense
quip run meta-llama/Llama-2-7b-hf c4 --codebook E8P12 --range tensor --save runs/llama-e8p
quip export runs/llama-e8p runs/llama-published --quip-sharp
quip run meta-llama/Llama-2-7b-hf c4 --quant gptq --wbits 4 --groupsize 128 --sym --save runs/sym
quip export runs/sym runs/llama-vllm --compressed-tensors
quip run meta-llama/Llama-2-7b-hf c4 --quant gptq --wbits 4 --groupsize 32 --sym --save runs/sym32
quip export runs/sym32 runs/llama-4bit.gguf --gguf
"""
FORMATS = ("dense", "quip_sharp", "compressed_tensors", "gptq", "gguf")


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
        "--compressed-tensors",
        action="store_true",
        help="format pack-quantized of compressed-tensors, packed as it is, for vLLM, SGLang and "
        "transformers: a model quantized with --sym and without rotation (--quant gptq --wbits 4 "
        "--groupsize 128 --sym)",
    )
    add(
        "--asymmetric",
        action="store_true",
        help="with --compressed-tensors: let matrices have zeros (quantized without --sym), which "
        "vLLM reads and transformers refuses",
    )
    add(
        "--gptq",
        action="store_true",
        help="the layout of GPTQ, packed as it is, for engines that read no other: a model "
        "quantized to 4 or 8 bits with --sym and without rotation",
    )
    add(
        "--gguf",
        action="store_true",
        help="a .gguf file for llama.cpp, packed as it is: a Llama, Mistral, Qwen2 or Qwen3 of "
        "integer grids in groups of 32, 64 ... inputs (--quant gptq --groupsize 32 --sym)",
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
            "export needs a format: add --dense for a plain Hugging Face one, --quip-sharp for the "
            "published layout of QuIP#, --compressed-tensors or --gptq for other engines, or "
            "--gguf for llama.cpp"
        )
    if len(formats) > 1:
        raise UsageError(f"{' and '.join(map(_flag, formats))} are two formats: leave one out")
    if args.quip_sharp and args.dtype not in ("auto", "float16"):
        raise UsageError(f"--dtype {args.dtype} with --quip-sharp: that layout is in float16")
    if args.gguf and args.dtype != "auto":
        raise UsageError(f"--dtype {args.dtype} with --gguf: each tensor there has its own type")
    if (args.compressed_tensors or args.gptq) and args.dtype != "auto":
        raise UsageError(
            f"--dtype {args.dtype} is for --dense: {_flag(formats[0])} keeps what the "
            "checkpoint computes in"
        )
    if args.asymmetric and not args.compressed_tensors:
        raise UsageError("--asymmetric is for --compressed-tensors: add that, or leave it out")

    from quip.jobs import export
    from quip.jobs.report.text import size_words

    where, options = (args.folder, args.out), {"overwrite": args.overwrite}
    if args.dense:
        size = export.export_dense(*where, dtype=args.dtype, **options)
        what = "a plain folder that loads without quip"
    elif args.quip_sharp:
        size = export.export_quip_sharp(*where, **options)
        what = "in the published layout of QuIP#"
    elif args.gguf:
        size, kinds = export.export_gguf(*where, **options)
        what = ", ".join(f"{count} matrices of {kind}" for kind, count in kinds.items())
    elif args.compressed_tensors:
        size = export.export_compressed_tensors(*where, asymmetric=args.asymmetric, **options)
        what = "in format pack-quantized of compressed-tensors"
    else:
        size = export.export_gptq(*where, **options)
        what = "in the layout of GPTQ"
    say(f"{args.out}: {size_words(size)}, {what}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
