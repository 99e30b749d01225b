"""`quip run MODEL DATASET`: quantize a model and measure what that cost."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quip.cli.flags import NAMED, NSAMPLES, PAPER_SETS, add_flags
from quip.cli.parse import Parser, guarded
from quip.cli.shared import TUNING, as_given, names, recipe_of, refuse_small, settle_bits, zero_shot
from quip.errors import UsageError

if TYPE_CHECKING:
    from quip.matrix.recipe import Recipe
    from quip.model.plan import Plan
    from quip.model.tune import BlockTuning

SUMMARY = "quantize a model, evaluate it, and report"


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
    settle_bits(args)
    _refuse_source(args)
    recipe = _plan(args, recipe_of(args))
    tuning = _tuning(args)
    evaluations = _evaluations(args)
    tasks = zero_shot(args)
    _refuse_values(args)

    from quip.jobs.report.text import table
    from quip.jobs.run import Experiment, run_experiment

    report = run_experiment(
        Experiment(
            model=args.model,
            dataset=args.dataset,
            recipe=recipe,
            tuning=tuning,
            hessians=args.hessians,
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


def _plan(args: argparse.Namespace, recipe: "Recipe | None") -> "Recipe | Plan | None":
    """The recipe of the line; with --plan, a plan of which it is the default."""
    if args.plan is None:
        return recipe

    from quip.jobs.plan import build_plan, read_plan

    path, args.plan = args.plan, read_plan(args.plan)  # a report holds what the file says
    try:
        return build_plan(args.plan, default=recipe)
    except UsageError as error:
        raise UsageError(f"--plan {path}: {error}") from error


def _is_unquantized(args: argparse.Namespace) -> bool:
    """Whether the line leaves all weights as they are."""
    return args.wbits == 16 and args.plan is None


def _refuse_source(args: argparse.Namespace) -> None:
    """DATASET or --hessians, and what goes with which."""
    if args.hessians is None:
        if args.dataset is None:
            raise UsageError(
                "the following arguments are required: dataset (--help explains every flag)"
            )
        return
    if args.dataset is not None:
        raise UsageError(
            f"--hessians {args.hessians} takes the place of calibration: leave out DATASET "
            f"({args.dataset})"
        )
    if _is_unquantized(args):
        raise UsageError("--hessians needs weights to quantize: give --wbits or --codebook")
    if args.nsamples != NSAMPLES:
        raise UsageError(
            f"--nsamples {args.nsamples} speaks of calibration, and --hessians needs none: leave "
            "out one"
        )


def _refuse_values(args: argparse.Namespace) -> None:
    refuse_small(args, nsamples=1, seqlen=2, eval_nsamples=1)
    if args.overwrite and args.out is None and args.save is None:
        raise UsageError("--overwrite speaks of folders: name one with --out DIR or --save DIR")
    if args.resume and args.out is None:
        raise UsageError("--resume takes up the run in --out: name the folder with --out DIR")
    if args.resume and args.overwrite:
        raise UsageError("--resume goes on and --overwrite starts over: leave one out")
    if _is_unquantized(args):
        for flag in ("save", "resume"):
            if getattr(args, flag):
                raise UsageError(f"--{flag} needs weights to quantize: give --wbits 2 to 8")
    elif args.load:
        raise UsageError(
            f"--load {args.load} evaluates what is quantized already: leave out --wbits, "
            "--codebook and --recipe"
        )


def _tuning(args: argparse.Namespace) -> "BlockTuning | None":
    given = {name: getattr(args, f"ft_{name}") for name in TUNING}
    if not args.ft_epochs:
        for name, value in given.items():
            if name != "epochs" and value is not None:
                raise UsageError(f"--ft_{name} speaks of fine-tuning: add --ft_epochs N")
        return None
    if _is_unquantized(args):
        raise UsageError("--ft_epochs needs weights to quantize: give --wbits or --codebook")

    from quip.model.tune import BlockTuning

    return BlockTuning(**{name: value for name, value in given.items() if value is not None})


def _evaluations(args: argparse.Namespace) -> tuple[str, ...]:
    if args.proxy_only:
        if _is_unquantized(args):
            raise UsageError("--proxy_only needs weights to quantize: give --wbits 2 to 8")
        if args.compare or args.eval_datasets or args.tasks:
            raise UsageError(
                "--proxy_only evaluates nothing: leave out --compare, --eval_datasets and --tasks"
            )
        return ()
    wanted = args.eval_datasets
    if wanted is None:
        dataset = args.dataset or _dataset_of(args.hessians)
        if dataset not in NAMED and (args.hessians or Path(dataset).expanduser().exists()):
            raise UsageError(
                f"DATASET {dataset} is a file or folder: say where to measure perplexity with "
                "--eval_datasets FILE,... (text that is not calibrated on), or `none`"
            )
        wanted = "pydoc" if dataset == "pydoc" else PAPER_SETS
    if wanted == "none":
        if args.compare or (_is_unquantized(args) and not args.tasks):
            flag = "--compare" if args.compare else "--wbits 16"
            raise UsageError(f"{flag} means to evaluate: leave out --eval_datasets none")
        return ()
    return names(wanted, "--eval_datasets")


def _dataset_of(store: Path) -> str:
    from quip.data.hessians import HessianStore

    return HessianStore(store).stamp["dataset"]


def _words(args: argparse.Namespace) -> str:
    if _is_unquantized(args):
        return f"as saved in {args.load}" if args.load else "as it is"
    tuned = ", fine-tuned" if args.ft_epochs else ""
    planned = [f"a plan of {len(args.plan)} patterns"] if args.plan else []
    line = [] if args.wbits == 16 else [_recipe_words(args)]
    return ", else ".join([*planned, *line]) + tuned


def _recipe_words(args: argparse.Namespace) -> str:
    faithful = ", as printed" if args.faithful else ""
    if args.codebook != "int":
        return f"{args.quant}, {args.codebook} ({args.wbits} bits){faithful}"
    processing = "with" if args.incoh_processing else "without"
    return f"{args.quant}, {args.wbits} bits, {processing} incoherence processing{faithful}"
