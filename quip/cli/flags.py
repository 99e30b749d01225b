"""Fields of `quip.matrix.flags.Flags` as flags of a command, and those that are of no recipe."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quip.cli.output import names
from quip.cli.parse import Arguments
from quip.cli.values import place, seed
from quip.codebooks.names import CODEBOOKS
from quip.errors import UsageError
from quip.matrix.build import build_recipe, check_flags
from quip.matrix.flags import FLAGS, IGNORED, Flags
from quip.matrix.said import as_line

if TYPE_CHECKING:
    from quip.evaluate.zeroshot import ZeroShot
    from quip.matrix.recipe import Recipe

NAMED = ("wikitext2", "ptb", "ptb-new", "c4", "c4-new", "pydoc")
NSAMPLES = 128  # as in the papers


def add_flag(group: argparse._ActionsContainer, name: str, **changes: Any) -> None:
    """A flag of recipes, but for the changes as everywhere; a switch also as --no-NAME."""
    known, said = FLAGS[name], FLAGS[name].metadata["said"]
    options = {"default": known.default, "help": said.help}
    if said.kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        choices = said.choices and list(said.choices)
        options |= {"type": said.kind, "choices": choices, "metavar": said.metavar}
    options |= changes
    group.add_argument(f"--{name}", **options).help = options["help"]  # without (default: False)


def recipe_flags(parser: argparse.ArgumentParser) -> None:
    """All that says how weights are rounded."""
    parser.add_argument(
        "--config",
        action="append",
        type=Path,
        metavar="FILE",
        help="a YAML file of flag names and values; flags on the line win, wherever they stand",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="the flags of a named recipe (`quip recipes` lists them); flags of files and on the "
        "line win, and each switch has its opposite, such as --no-incoh_processing",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, known in FLAGS.items():
        title = known.metadata["said"].group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_flag(groups[title], name)


def settle_bits(args: Arguments) -> None:
    """A lattice has its own bits; where neither is named, the model is evaluated as it is."""
    if args.wbits is None:
        args.wbits = CODEBOOKS[args.codebook].only_bits or 16


def check_recipe(args: Arguments) -> None:
    """Raise UsageError for flags of `recipe_flags` that mean nothing, once bits are settled."""
    given = _recipe_given(args)
    if has_recipe(args):
        check_flags(**given)
        return
    Flags(**given).check()
    if "wbits" in args.given:  # 16, which evaluates the model as it is, whatever a file says
        return
    for name, value in given.items():
        if name not in ("wbits", "codebook", *IGNORED) and value is not False:
            [words] = as_line({name: value})
            raise UsageError(
                f"{words.replace('=', ' ')} speaks of weights that are quantized: give --wbits or "
                "--codebook, or leave it out"
            )


def recipe_of(args: Arguments) -> "Recipe | None":
    """What the flags of `recipe_flags` say, once bits are settled; None: weights as they are."""
    return build_recipe(**_recipe_given(args)) if has_recipe(args) else None


def has_recipe(args: Arguments) -> bool:
    """Whether weights are quantized."""
    return args.wbits != 16 or CODEBOOKS[args.codebook].only_bits is not None


def _recipe_given(args: Arguments) -> dict[str, Any]:
    given = args.given | {"wbits"}
    return {known.name: getattr(args, name) for name, known in FLAGS.items() if name in given}


def recipe_words(args: Arguments) -> str:
    """The recipe of these flags, once bits are settled, for a person."""
    faithful = ", as printed" if args.faithful else ""
    if CODEBOOKS[args.codebook].only_bits or args.codebook == "trellis":
        return f"{args.quant}, {args.codebook} ({args.wbits} bits){faithful}"
    processing = "with" if args.incoh_processing else "without"
    return f"{args.quant}, {args.wbits} bits, {processing} incoherence processing{faithful}"


def model_and_dataset(parser: argparse.ArgumentParser) -> argparse.Action:
    """MODEL and DATASET, which is returned."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=place,
        help="a Hugging Face hub id, a local model folder, a .gguf file, or `demo`, the small "
        "OPT that comes with this package",
    )
    return parser.add_argument(
        "dataset",
        metavar="DATASET",
        type=place,
        help=f"calibration text: {', '.join(NAMED)} (the documentation inside CPython, no "
        "download), or a .txt, .json, .jsonl or .parquet file or a folder of such files",
    )


def window_flags(group: argparse._ArgumentGroup, *, windows: str, count: int, seeded: str) -> None:
    """How many windows of how many tokens, and the seed of what is drawn."""
    add = group.add_argument
    add(
        "--nsamples",
        type=int,
        default=count,
        metavar="N",
        help=f"{windows} (default {count})",
    )
    add(
        "--seqlen",
        type=int,
        metavar="N",
        help="tokens in a window (default: what the model can take, at most 2048)",
    )
    add("--seed", type=seed, default=0, metavar="N", help=f"of {seeded} (default 0)")


def calibration_flags(group: argparse._ArgumentGroup) -> None:
    """How much text, the seed, and what experts see of it."""
    seeded = "sampling and rotations"
    window_flags(group, windows="calibration windows", count=NSAMPLES, seeded=seeded)
    add = group.add_argument
    add(
        "--all_experts",
        action="store_true",
        help="of a mixture of experts, calibrate each expert on all tokens, not on those that the "
        "router sends to it",
    )
    add(
        "--token_weights",
        default="none",
        choices=["none", "fisher", "labels"],
        help="weigh each token in H by the squared gradient of the loss at the outputs, from one "
        "pass forward and back before the walk: with labels that the model itself draws (fisher), "
        "or the next tokens (labels)",
    )


def task_flags(group: argparse._ArgumentGroup) -> None:
    """Zero-shot tasks, which `zero_shot` reads."""
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


def refuse_tasks(args: Arguments) -> None:
    """Raise UsageError for flags that speak of tasks where there are none."""
    if args.batch_size < 1:
        raise UsageError(f"--batch_size {args.batch_size}: at least 1 is needed")
    for name in ("num_fewshot", "limit", "storycloze_csv"):
        if args.tasks is None and name in args.given:
            raise UsageError(f"--{name} speaks of zero-shot tasks: name some with --tasks A,B")


def zero_shot(args: Arguments) -> "ZeroShot | None":
    """The tasks asked for."""
    if args.tasks is None:
        return None

    from quip.evaluate.zeroshot import ZeroShot

    return ZeroShot(
        tasks=names(args.tasks, "--tasks"),
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        storycloze_csv=args.storycloze_csv,
    )
