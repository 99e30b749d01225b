"""`quip run MODEL DATASET`: quantize a model and measure what that cost."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quip.cli.door import Parser, guarded
from quip.cli.flags import NAMED, PAPER_SETS, add_flags
from quip.cli.shared import TUNING, as_given, names, refuse_small, zero_shot
from quip.errors import UsageError

if TYPE_CHECKING:
    from quip.finetune import BlockTuning
    from quip.recipe import Recipe

SUMMARY = "quantize a model, evaluate it, and report"
RECIPE_FLAGS = (
    *("incoh_processing", "pre_rescale", "pre_proj", "pre_proj_extra", "qfn", "rho", "faithful"),
    *("npasses", "unbiased", "groupsize", "percdamp", "codebook", "rotation", "hadamard_block"),
    *("scale", "scale_override", "resid_scale_override", "no_fuse"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m quip.run`. Returns the exit status."""
    parser = Parser(prog="quip.run", description=SUMMARY.capitalize() + ".")
    build(parser)
    return guarded(parser, argv)


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add_flags(parser)
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Turn strings into plain values, run, and print the result."""
    _settle_bits(args)
    recipe = _recipe(args)
    tuning = _tuning(args)
    evaluations = _evaluations(args)
    tasks = zero_shot(args)
    _refuse_values(args)

    from quip.experiment import Experiment, run_experiment
    from quip.table import table

    report = run_experiment(
        Experiment(
            model=args.model,
            dataset=args.dataset,
            recipe=recipe,
            tuning=tuning,
            load=args.load,
            method=_words(args),
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            seed=args.seed,
            device=args.device,
            dtype=args.dtype,
            eval_datasets=evaluations,
            eval_nsamples=args.eval_nsamples,
            tasks=tasks,
            batch_size=args.batch_size,
            compare=args.compare,
            save=args.save,
            out=args.out,
            resume=args.resume,
            overwrite=args.overwrite,
            flags=as_given(args),
        )
    )
    print(table(report))


def _refuse_values(args: argparse.Namespace) -> None:
    refuse_small(args, nsamples=1, seqlen=2, eval_nsamples=1)
    if args.overwrite and args.out is None and args.save is None:
        raise UsageError("--overwrite speaks of folders: name one with --out DIR or --save DIR")
    if args.resume and args.out is None:
        raise UsageError("--resume takes up the run in --out: name the folder with --out DIR")
    if args.resume and args.overwrite:
        raise UsageError("--resume goes on and --overwrite starts over: leave one out")
    if args.wbits == 16:
        for flag in ("save", "resume"):
            if getattr(args, flag):
                raise UsageError(f"--{flag} needs weights to quantize: give --wbits 2 to 8")
    elif args.load:
        raise UsageError(
            f"--load {args.load} evaluates what is quantized already: leave out --wbits, "
            "--codebook and --recipe"
        )


def _settle_bits(args: argparse.Namespace) -> None:
    """A lattice has its own bits; where neither is named, the model is evaluated as it is."""
    if args.wbits is None and args.codebook == "int":
        args.wbits = 16
    elif args.wbits is None:
        from quip.codebooks import LATTICES

        args.wbits = LATTICES[args.codebook].bits


def _recipe(args: argparse.Namespace) -> "Recipe | None":
    from quip.recipes import build_recipe

    if args.wbits == 16 and args.codebook == "int":
        return None
    options = {name: getattr(args, name) for name in RECIPE_FLAGS}
    return build_recipe(quant=args.quant, wbits=args.wbits, range_=args.range, **options)


def _tuning(args: argparse.Namespace) -> "BlockTuning | None":
    given = {name: getattr(args, f"ft_{name}") for name in TUNING}
    if not args.ft_epochs:
        for name, value in given.items():
            if name != "epochs" and value is not None:
                raise UsageError(f"--ft_{name} speaks of fine-tuning: add --ft_epochs N")
        return None
    if args.wbits == 16:
        raise UsageError("--ft_epochs needs weights to quantize: give --wbits or --codebook")

    from quip.finetune import BlockTuning

    return BlockTuning(**{name: value for name, value in given.items() if value is not None})


def _evaluations(args: argparse.Namespace) -> tuple[str, ...]:
    if args.proxy_only:
        if args.wbits == 16:
            raise UsageError("--proxy_only needs weights to quantize: give --wbits 2 to 8")
        if args.compare or args.eval_datasets or args.tasks:
            raise UsageError(
                "--proxy_only evaluates nothing: leave out --compare, --eval_datasets and --tasks"
            )
        return ()
    wanted = args.eval_datasets
    if wanted is None:
        if args.dataset not in NAMED and Path(args.dataset).expanduser().exists():
            raise UsageError(
                f"DATASET {args.dataset} is a file or folder: say where to measure perplexity with "
                "--eval_datasets FILE,... (text that is not calibrated on), or `none`"
            )
        wanted = "pydoc" if args.dataset == "pydoc" else PAPER_SETS
    if wanted == "none":
        if args.compare or (args.wbits == 16 and not args.tasks):
            flag = "--compare" if args.compare else "--wbits 16"
            raise UsageError(f"{flag} means to evaluate: leave out --eval_datasets none")
        return ()
    return names(wanted, "--eval_datasets")


def _words(args: argparse.Namespace) -> str:
    if args.wbits == 16:
        return f"as saved in {args.load}" if args.load else "as it is"
    faithful = ", as printed" if args.faithful else ""
    tuned = ", fine-tuned" if args.ft_epochs else ""
    if args.codebook != "int":
        return f"{args.quant}, {args.codebook} ({args.wbits} bits){faithful}{tuned}"
    processing = "with" if args.incoh_processing else "without"
    return f"{args.quant}, {args.wbits} bits, {processing} incoherence processing{faithful}{tuned}"
