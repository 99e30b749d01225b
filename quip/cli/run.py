"""`quip run MODEL DATASET`: quantize a model and measure what that cost."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from quip.cli.dry_run import dry_run_flags, foretold, refuse_json
from quip.cli.evaluations import PAPER_SETS, evaluations_of
from quip.cli.flags import (
    calibration_flags,
    check_recipe,
    has_recipe,
    model_and_dataset,
    recipe_flags,
    recipe_of,
    recipe_words,
    refuse_tasks,
    settle_bits,
    task_flags,
    zero_shot,
)
from quip.cli.machine import machine_flags, memory_flags, team_flags
from quip.cli.parse import Arguments, as_given, refuse_both, refuse_small
from quip.cli.streams import say
from quip.cli.tuning import (
    beside_flags,
    refuse_beside,
    refuse_tuning,
    tuning_flags,
    tuning_of,
)
from quip.cli.values import place
from quip.errors import UsageError
from quip.jobs.requests import request

if TYPE_CHECKING:
    from quip.matrix.recipe import Recipe
    from quip.model.plan import Plan

HELP = "quantize a model, evaluate it, and report"
USAGE = "quip run MODEL (DATASET | --hessians DIR) [FLAGS]"
EXAMPLES = """
quip run demo pydoc --wbits 2 --incoh_processing --save runs/demo-2bit
quip run demo pydoc --wbits 3 --quant gptq --compare --out runs/demo-gptq3
quip run facebook/opt-125m c4 --recipe quip-2bit
quip run model.gguf train.txt --wbits 4 --eval_datasets test.txt
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    # Without nargs="?", which would take nothing where a flag stands before DATASET.
    model_and_dataset(parser).required = False
    recipe_flags(parser)
    parser.add_argument(
        "--head_bits",
        type=int,
        choices=range(4, 9),
        metavar="N",
        help="quantize embedding and head as well, to 4 ... 8 bits, on grids of 64 columns of a "
        "row; tied ones stay one",
    )
    tuning_flags(parser.add_argument_group("fine-tuning"))
    beside_flags(parser.add_argument_group("what rounding looks at beside the inputs of a matrix"))
    _data_flags(parser.add_argument_group("data and evaluation"))
    task_flags(parser.add_argument_group("zero-shot tasks"))
    _machine_flags(parser.add_argument_group("machine and output"))
    parser.set_defaults(call=call)


def _data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--plan",
        type=Path,
        metavar="FILE",
        help='recipes by pattern of matrix names, as YAML: "*.v_proj": {wbits: 4} and so on; the '
        "first that matches counts, and the recipe of this line is for all other matrices",
    )
    add(
        "--hessians",
        type=Path,
        metavar="DIR",
        help="quantize from this store (`quip hessians`), without calibration: leave out DATASET",
    )
    calibration_flags(group)
    add(
        "--eval_datasets",
        metavar="A,B,...",
        help="where perplexity is measured: names as for DATASET, or `none`; by default pydoc "
        f"if that is DATASET, else {PAPER_SETS}",
    )
    add(
        "--eval_nsamples",
        type=int,
        metavar="N",
        help="evaluate on the first N windows of each data set (default: all)",
    )
    add(
        "--compare",
        action="store_true",
        help="evaluate the original model too, and show the difference",
    )
    add(
        "--proxy_only",
        action="store_true",
        help="quantize and report the proxy losses, without perplexities",
    )


def _machine_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--save",
        type=Path,
        metavar="DIR",
        help="a new or empty folder for the packed checkpoint, written before evaluation",
    )
    add(
        "--load",
        type=place,
        metavar="DIR",
        help="evaluate this checkpoint of MODEL, which is then only read for --compare",
    )
    add(
        "--resume",
        action="store_true",
        help="take up the run that --out holds, after its last finished block; without one, start",
    )
    dry_run_flags(group)
    memory_flags(group)
    machine_flags(
        group,
        out="a folder for run.json, layers.csv, layers.png and the finished blocks; it must be new "
        "or empty",
    )
    team_flags(group)


def call(args: Arguments) -> None:
    """Turn strings into plain values, run, and print the result. Refusals come before imports."""
    settle_bits(args)
    _refuse_source(args)
    check_recipe(args)
    refuse_tuning(args, quantizes=not _is_unquantized(args))
    refuse_beside(args, quantizes=not _is_unquantized(args))
    evaluations = evaluations_of(args, quantizes=not _is_unquantized(args))
    refuse_tasks(args)
    refuse_json(args)
    _refuse_values(args)
    recipe = _plan(args, recipe_of(args))
    if args.dry_run:
        foretold(args, recipe=recipe, tuning=tuning_of(args), eval_datasets=evaluations)
        return

    from quip.jobs.experiment import Experiment
    from quip.jobs.report.text import table
    from quip.jobs.run import run_experiment

    report = run_experiment(
        request(
            *(Experiment, args),
            recipe=recipe,
            tuning=tuning_of(args),
            method=_words(args),
            eval_datasets=evaluations,
            tasks=zero_shot(args),
            flags=as_given(args),
        )
    )
    say(table(report))


def _plan(args: Arguments, recipe: "Recipe | None") -> "Recipe | Plan | None":
    """The recipe of the line; with --plan, a plan of which it is the default."""
    if args.plan is None:
        return recipe

    from quip.jobs.plan import build_plan, part_head, read_plan

    path, args.plan = args.plan, read_plan(args.plan)  # a report holds what the file says
    try:
        rows, bits = part_head(args.plan)
        if bits and args.head_bits not in (None, bits):
            raise UsageError(f"it says head_bits {bits}, and the line --head_bits {args.head_bits}")
        args.head_bits = bits or args.head_bits
        return build_plan(rows, default=recipe)
    except UsageError as error:
        raise UsageError(f"--plan {path}: {error}") from error


def _is_unquantized(args: Arguments) -> bool:
    return not has_recipe(args) and args.plan is None


def _refuse_source(args: Arguments) -> None:
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
    for name in ("nsamples", "all_experts"):
        if name in args.given:
            value = "" if name == "all_experts" else f" {getattr(args, name)}"
            raise UsageError(
                f"--{name}{value} speaks of calibration, and --hessians needs none: leave out one"
            )


def _refuse_values(args: Arguments) -> None:
    refuse_small(args, nsamples=1, seqlen=2, eval_nsamples=1, activation_memory=0)
    if args.overwrite and args.out is None and args.save is None:
        raise UsageError("--overwrite speaks of folders: name one with --out DIR or --save DIR")
    if args.resume and args.out is None:
        raise UsageError("--resume takes up the run in --out: name the folder with --out DIR")
    refuse_both(args)
    if _is_unquantized(args):
        for flag in ("save", "resume", "head_bits"):
            if getattr(args, flag):
                raise UsageError(f"--{flag} needs weights to quantize: give --wbits 2 to 8")
    elif args.load:
        raise UsageError(
            f"--load {args.load} evaluates what is quantized already: leave out --wbits, "
            "--codebook and --recipe"
        )


def _words(args: Arguments) -> str:
    if _is_unquantized(args):
        return f"as saved in {args.load}" if args.load else "as it is"
    tuned = ", fine-tuned" if args.ft_epochs else ""
    tuned += ", two-sided" if args.two_sided else ""
    tuned += f", targets shrunk by {args.target_shrink}" if args.target_shrink else ""
    patterns = [name for name in args.plan or () if name != "head_bits"]
    planned = [f"a plan of {len(patterns)} patterns"] if patterns else []
    line = [recipe_words(args)] if has_recipe(args) else []
    return ", else ".join([*planned, *line]) + tuned
