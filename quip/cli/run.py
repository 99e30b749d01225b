"""`quip run MODEL DATASET`: quantize a model and measure what that cost."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quip.cli.door import Parser, guarded
from quip.cli.flags import NAMED, PAPER_SETS, add_flags
from quip.errors import UsageError

if TYPE_CHECKING:
    from quip.recipe import Recipe

SUMMARY = "quantize a model, evaluate it, and report"
RECIPE_FLAGS = (
    *("incoh_processing", "pre_rescale", "pre_proj", "pre_proj_extra", "qfn", "rho", "faithful"),
    *("npasses", "unbiased", "groupsize", "percdamp"),
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
    recipe = _recipe(args)
    evaluations = _evaluations(args)
    _refuse_values(args)

    from quip.experiment import Experiment, run_experiment
    from quip.report import table

    report = run_experiment(
        Experiment(
            model=args.model,
            dataset=args.dataset,
            recipe=recipe,
            method=_words(args) if recipe else "as it is",
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            seed=args.seed,
            device=args.device,
            dtype=args.dtype,
            eval_datasets=evaluations,
            eval_nsamples=args.eval_nsamples,
            compare=args.compare,
            out=args.out,
            overwrite=args.overwrite,
            flags={name: value for name, value in vars(args).items() if name != "call"},
        )
    )
    print(table(report))


def _refuse_values(args: argparse.Namespace) -> None:
    for name, low in (("nsamples", 1), ("seqlen", 2), ("eval_nsamples", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UsageError(f"--{name} {value}: at least {low} is needed")
    if args.overwrite and args.out is None:
        raise UsageError("--overwrite speaks of --out: name the folder with --out DIR")


def _recipe(args: argparse.Namespace) -> "Recipe | None":
    from quip.recipe import build_recipe

    if args.wbits == 16:
        return None
    options = {name: getattr(args, name) for name in RECIPE_FLAGS}
    return build_recipe(quant=args.quant, wbits=args.wbits, range_=args.range, **options)


def _evaluations(args: argparse.Namespace) -> tuple[str, ...]:
    if args.proxy_only:
        if args.wbits == 16:
            raise UsageError("--proxy_only needs weights to quantize: give --wbits 2 to 8")
        if args.compare or args.eval_datasets:
            raise UsageError("--proxy_only evaluates nothing: leave out --compare, --eval_datasets")
        return ()
    names = args.eval_datasets
    if names is None:
        if args.dataset not in NAMED and Path(args.dataset).expanduser().exists():
            raise UsageError(
                f"DATASET {args.dataset} is a file or folder: say where to measure perplexity with "
                "--eval_datasets FILE,... (text that is not calibrated on), or `none`"
            )
        names = "pydoc" if args.dataset == "pydoc" else PAPER_SETS
    if names == "none":
        if args.compare or args.wbits == 16:
            flag = "--compare" if args.compare else "--wbits 16"
            raise UsageError(f"{flag} means to evaluate: leave out --eval_datasets none")
        return ()
    evaluations = tuple(filter(None, names.split(",")))
    if not evaluations:
        raise UsageError(f"--eval_datasets {names!r}: name a data set or a file, or say `none`")
    return evaluations


def _words(args: argparse.Namespace) -> str:
    processing = "with" if args.incoh_processing else "without"
    faithful = ", as printed" if args.faithful else ""
    return f"{args.quant}, {args.wbits} bits, {processing} incoherence processing{faithful}"
