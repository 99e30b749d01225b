"""`quip hessians MODEL DATASET --save DIR`: a store of the Hessians of all inputs."""

import argparse
from pathlib import Path

from quip.cli.dry_run import dry_run_flags, foretold, refuse_json
from quip.cli.flags import (
    calibration_flags,
    check_recipe,
    has_recipe,
    model_and_dataset,
    recipe_flags,
    recipe_of,
    settle_bits,
)
from quip.cli.machine import device_flags, memory_flags, team_flags
from quip.cli.parse import Arguments, refuse_both, refuse_small
from quip.cli.streams import say
from quip.codebooks.names import CODEBOOKS
from quip.errors import UsageError
from quip.jobs.requests import request
from quip.matrix.flags import FLAGS, IGNORED

HELP = "collect the second moments of all inputs in a store"
EXAMPLES = """
quip hessians demo pydoc --save demo-hessians
quip run demo --hessians demo-hessians --wbits 2 --incoh_processing
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    model_and_dataset(parser)
    add("--save", type=Path, required=True, metavar="DIR", help="the folder of the store")
    add(
        "--from",
        default="original",
        choices=["original", "quantized"],
        help="the inputs of the unquantized model (original, the default), or those that each "
        "block gets from the quantized blocks before it, as in `quip run` with the same flags",
    )
    recipe_flags(parser)
    calibration_flags(parser.add_argument_group("data"))
    group = parser.add_argument_group("machine and output")
    device_flags(group)
    team_flags(group)
    memory_flags(group)
    group.add_argument(
        "--resume",
        action="store_true",
        help="complete the store that DIR holds, after its last finished block; without one, start",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="start over where DIR holds another store"
    )
    dry_run_flags(group)
    parser.set_defaults(call=call)


def call(args: Arguments) -> None:
    """Collect, and say what came of it."""
    _refuse_recipe(args)
    refuse_small(args, nsamples=1, seqlen=2, activation_memory=0)
    refuse_both(args)
    refuse_json(args)
    recipe = None if getattr(args, "from") == "original" else recipe_of(args)
    if args.dry_run:
        foretold(args, recipe=recipe, collects=True)
        return

    from quip.jobs.hessians import Collection, collect_hessians
    from quip.jobs.report.text import size_words

    found = collect_hessians(request(Collection, args, recipe=recipe))
    say(
        f"{args.save}: {found.inputs} inputs of {found.matrices} matrices, {found.tokens:,} "
        f"tokens, {size_words(found.nbytes)}, {found.seconds:.1f} s; quantize from it with: "
        f"quip run {args.model} --hessians {args.save} {' '.join(_of_a_run(args))}"
    )


def _refuse_recipe(args: Arguments) -> None:
    """Raise UsageError for flags that would be ignored, and for a recipe that is missing."""
    if getattr(args, "from") == "quantized":
        settle_bits(args)
        check_recipe(args)
        if not has_recipe(args):
            raise UsageError(
                "--from quantized needs weights to quantize: give --wbits or --codebook"
            )
        return
    for name in FLAGS:
        if name in args.given and name not in IGNORED:
            raise UsageError(
                f"--{name} says how to quantize, and --from original does not: add --from "
                f"quantized, or leave out --{name}"
            )


def _of_a_run(args: Arguments) -> list[str]:
    """The flags of a run from the store: of its own recipe, seed and dtype, where it has them."""
    defaults = {name: known.default for name, known in FLAGS.items() if name not in IGNORED}
    defaults |= {"seed": 0, "dtype": "auto", "token_weights": "none"}
    given = {name: getattr(args, name) for name in defaults}
    if getattr(args, "from") == "original":
        given["wbits"] = 2
    elif CODEBOOKS[args.codebook].only_bits:
        given["wbits"] = None
    changed = {name: value for name, value in given.items() if value != defaults[name]}
    return [
        f"--{name}" if value is True else f"--{name} {value}" for name, value in changed.items()
    ]
