"""`quip hessians MODEL DATASET --save DIR`: a store of the Hessians of all inputs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from quip.cli.flags import calibration_flags, model_and_dataset, recipe_flags
from quip.cli.parse import Parser
from quip.cli.shared import RECIPE_FLAGS, device_flags, recipe_of, refuse_small, settle_bits
from quip.errors import UsageError

if TYPE_CHECKING:
    from quip.matrix.recipe import Recipe

SUMMARY = "collect the second moments of all inputs in a store"


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
    group.add_argument(
        "--resume",
        action="store_true",
        help="complete the store that DIR holds, after its last finished block; without one, start",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="start over where DIR holds another store"
    )
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Collect, and say what came of it."""
    recipe = _recipe(args)
    refuse_small(args, nsamples=1, seqlen=2)
    if args.resume and args.overwrite:
        raise UsageError("--resume goes on and --overwrite starts over: leave one out")

    from quip.jobs.hessians import Collection, collect_hessians
    from quip.jobs.report.text import size_words

    found = collect_hessians(
        Collection(
            model=args.model,
            dataset=args.dataset,
            save=args.save,
            recipe=recipe,
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            seed=args.seed,
            device=args.device,
            dtype=args.dtype,
            resume=args.resume,
            overwrite=args.overwrite,
        )
    )
    print(
        f"{args.save}: {found.inputs} inputs of {found.matrices} matrices, {found.tokens:,} "
        f"tokens, {size_words(found.nbytes)}, {found.seconds:.1f} s; quantize from it with: "
        f"quip run {args.model} --hessians {args.save} {' '.join(_of_a_run(args))}"
    )


def _recipe(args: argparse.Namespace) -> "Recipe | None":
    """What the blocks are quantized with, if they are."""
    if getattr(args, "from") == "original":
        _refuse_recipe(args)
        return None
    settle_bits(args)
    recipe = recipe_of(args)
    if recipe is None:
        raise UsageError("--from quantized needs weights to quantize: give --wbits or --codebook")
    return recipe


def _of_a_run(args: argparse.Namespace) -> list[str]:
    """The flags of a run from the store: of its own recipe, seed and dtype, where it has them."""
    known = {"wbits": 2} if getattr(args, "from") == "original" else _recipe_given(args)
    if args.codebook != "int":
        del known["wbits"]  # a lattice has its own
    given = known | _given(args, "seed", "dtype")
    return [f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items()]


def _refuse_recipe(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that would be ignored."""
    for name in _recipe_given(args):
        raise UsageError(
            f"--{name} says how to quantize, and --from original does not: add --from "
            f"quantized, or leave out --{name}"
        )


def _recipe_given(args: argparse.Namespace) -> dict[str, object]:
    return _given(args, "wbits", "quant", "range", *RECIPE_FLAGS)


def _given(args: argparse.Namespace, *names: str) -> dict[str, object]:
    """The named flags, by name, whose values are not those by default."""
    parser = Parser()
    build(parser)
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value != parser.get_default(name)}
