"""Flags that several commands have, and what they become."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quip.errors import UsageError

if TYPE_CHECKING:
    from quip.evaluate.zeroshot import ZeroShot
    from quip.matrix.recipe import Recipe

TUNING = ("epochs", "lr", "signs_lr", "batch_size", "patience", "held_out")  # what tuning takes
RECIPE_FLAGS = (
    *("incoh_processing", "pre_rescale", "pre_proj", "pre_proj_extra", "qfn", "rho", "faithful"),
    *("npasses", "unbiased", "groupsize", "percdamp", "codebook", "rotation", "hadamard_block"),
    *("scale", "scale_override", "resid_scale_override", "no_fuse"),
)


def task_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tasks",
        metavar="A,B,...",
        help="zero-shot tasks: any name of lm-eval (arc_easy, piqa ...), or our own: lambada_quip, "
        "prompted as in QuIP; storycloze, from --storycloze_csv; quip_demo_cloze, no download",
    )
    add("--num_fewshot", type=int, default=0, metavar="N", help="examples shown (default 0)")
    add("--batch_size", type=int, default=8, metavar="N", help="of zero-shot tasks (default 8)")
    add("--limit", type=int, metavar="N", help="the first N documents of each task (default: all)")
    add(
        "--storycloze_csv",
        type=Path,
        metavar="FILE",
        help="the StoryCloze file; its licence form is yours to sign",
    )


def device_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="what the model computes in; auto, the default, is float32, and for a checkpoint of "
        "quip what the run computed in that saved it",
    )


def machine_flags(group: argparse._ArgumentGroup, *, out: str) -> None:
    device_flags(group)
    add = group.add_argument
    add("--out", type=Path, metavar="DIR", help=out)
    add(
        "--overwrite",
        action="store_true",
        help="write where files are: --out loses those of the run before, a "
        "checkpoint is replaced whole",
    )


def zero_shot(args: argparse.Namespace) -> "ZeroShot | None":
    """The tasks asked for. Raises UsageError for flags that speak of none."""
    if args.batch_size < 1:
        raise UsageError(f"--batch_size {args.batch_size}: at least 1 is needed")
    if args.tasks is None:
        for name, unset in (("num_fewshot", 0), ("limit", None), ("storycloze_csv", None)):
            if getattr(args, name) != unset:
                raise UsageError(f"--{name} speaks of zero-shot tasks: name some with --tasks A,B")
        return None

    from quip.evaluate.zeroshot import ZeroShot

    return ZeroShot(
        tasks=names(args.tasks, "--tasks"),
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        storycloze_csv=args.storycloze_csv,
    )


def settle_bits(args: argparse.Namespace) -> None:
    """A lattice has its own bits; where neither is named, the model is evaluated as it is."""
    if args.wbits is None and args.codebook == "int":
        args.wbits = 16
    elif args.wbits is None:
        from quip.codebooks import LATTICES

        args.wbits = LATTICES[args.codebook].bits


def recipe_of(args: argparse.Namespace) -> "Recipe | None":
    """What the flags of `recipe_flags` say, once bits are settled; None: weights as they are."""
    from quip.matrix.build import build_recipe

    if args.wbits == 16 and args.codebook == "int":
        return None
    options = {name: getattr(args, name) for name in RECIPE_FLAGS}
    return build_recipe(quant=args.quant, wbits=args.wbits, range_=args.range, **options)


def names(text: str, flag: str) -> tuple[str, ...]:
    """A,B,... as a tuple. Raises UsageError if there is none."""
    found = tuple(filter(None, text.split(",")))
    if not found:
        raise UsageError(f"{flag} {text!r}: name one or more, as in {flag} A,B")
    return found


def number_or_auto(text: str) -> float | str:
    """The type of a flag that takes either."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: a number or auto is needed") from None


def refuse_small(args: argparse.Namespace, **least: int) -> None:
    """Raise UsageError for a number below what is needed at least."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise UsageError(f"--{name} {value}: at least {low} is needed")


def as_given(args: argparse.Namespace) -> dict[str, object]:
    """The flags for the report."""
    given = {name: value for name, value in vars(args).items() if name != "call"}
    return {name: value for name, value in given.items() if name != "plan" or value is not None}


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns under one another: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    )
