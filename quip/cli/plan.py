"""`quip plan MODEL DATASET --bits B --out FILE`: a recipe for each matrix, within a budget."""

import argparse
import shlex
from pathlib import Path

from quip.cli.flags import model_and_dataset, recipe_flags, window_flags
from quip.cli.machine import device_flags, stream_flag, team_flags
from quip.cli.output import aligned, names
from quip.cli.parse import Arguments, refuse_small
from quip.cli.streams import say
from quip.codebooks.names import Bits
from quip.errors import UsageError, shown
from quip.jobs.requests import request
from quip.matrix.flags import FLAGS, IGNORED
from quip.matrix.said import as_line, number

SOURCES = ("fisher", "measured", "rules", "uniform")
NSAMPLES = 16
HELP = "choose how many bits each matrix gets, within a budget"
USAGE = "quip plan MODEL [DATASET] --bits B --out FILE [FLAGS]"
EXAMPLES = """
quip plan demo pydoc --bits 2.5 --out plan.yaml
quip run demo pydoc --plan plan.yaml --save runs/demo-mixed
quip plan demo --bits 3.2 --codebook int --by rules --out rules.yaml
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    # Without nargs="?", which would take nothing where a flag stands before DATASET.
    model_and_dataset(parser).required = False
    add = parser.add_argument
    add(
        "--bits",
        type=float,
        required=True,
        metavar="B",
        help="bits per weight of all that is stored of the matrices, which the plan stays within",
    )
    add(
        "--choices",
        metavar="A,B,...",
        help="the widths that there are to choose from (default: 1.5,2,2.5,3,4 of trellis; 2,3,4)",
    )
    add(
        "--by",
        default="fisher",
        choices=SOURCES,
        help="where bits go: fisher, the default, by the loss that the gradient of the model's own "
        "predictions expects of each width; measured, by the KL that is gained where a matrix "
        "comes from the second of --checkpoints instead of the first; rules, k and v, first and "
        "last blocks before others; uniform, one width for all",
    )
    add(
        "--checkpoints",
        metavar="A,B",
        help="of --by measured: the model quantized narrowly, and widely",
    )
    add(
        "--whole_stacks",
        action="store_true",
        help="matrices that read one input (q, k and v; up and gate) get one width, so that "
        "lattices still stack them",
    )
    add(
        "--head_bits",
        type=int,
        choices=range(4, 9),
        metavar="N",
        help="a row of embedding and head in the plan, of 4 ... 8 bits; --bits counts them apart",
    )
    add("--out", type=Path, required=True, metavar="FILE", help="the plan, for `quip run --plan`")
    add("--overwrite", action="store_true", help="let --out be a file that exists")
    recipe_flags(parser)
    parser.set_defaults(codebook="trellis")
    window_flags(
        parser.add_argument_group("data"),
        windows="windows of DATASET that are looked at",
        count=NSAMPLES,
        seeded="sampling and labels",
    )
    group = parser.add_argument_group("machine")
    stream_flag(group)
    device_flags(group)
    team_flags(group)
    parser.set_defaults(call=call)


def call(args: Arguments) -> None:
    """Choose, write the file, and say what came of it."""
    refuse_small(args, nsamples=1, seqlen=2, bits=0)
    checkpoints = _checkpoints(args)
    flags = _flags(args)

    from quip.jobs.planning.choices import flags_of, usual_widths

    widths = _widths(args.choices) if args.choices else usual_widths(args.codebook)
    choices = {width: flags_of(flags, width) for width in widths}

    from quip.jobs.planning.job import Planning, make_plan

    line = _line(args, flags)
    found = make_plan(request(Planning, args, choices=choices, checkpoints=checkpoints, line=line))
    rows = [["bits of codes", *found.widths], ["", *(f"{w:.2f}" for w in found.widths.values())]]
    expected = (
        ""
        if found.damage is None
        else f"; expected KL {found.damage:.4g} nats per token, against {found.uniform_damage:.4g}"
    )
    together = f"; with embedding and head {found.with_head:.4f}" if found.with_head else ""
    say(
        f"{aligned(rows)}\n{args.out}: {found.bits_per_weight:.4f} bits per weight, within "
        f"{args.bits:g} (one width for all: {found.uniform:.4f}){together}{expected}; "
        f"{found.seconds:.1f} s"
    )


def _checkpoints(args: Arguments) -> tuple[str, ...]:
    """The two checkpoints, and what else goes with which source."""
    if args.dataset is None and args.by in ("fisher", "measured"):
        raise UsageError(
            f"--by {args.by} looks at text: give DATASET, or say --by rules or --by uniform"
        )
    if (args.checkpoints is not None) != (args.by == "measured"):
        raise UsageError("--checkpoints A,B and --by measured go together: give both, or neither")
    found = names(args.checkpoints, "--checkpoints") if args.checkpoints else ()
    if len(found) not in (0, 2):
        raise UsageError(f"--checkpoints {args.checkpoints}: two are needed, the narrow one first")
    return found


def _flags(args: Arguments) -> dict[str, object]:
    """What the line says of every recipe, but for its bits."""
    if "wbits" in args.given and args.recipe is None:
        raise UsageError(
            f"--wbits {args.wbits} is of one width: leave it out, and say --bits and --choices"
        )
    left_out = ("wbits", *IGNORED)
    given = {name: getattr(args, name) for name in FLAGS if name in args.given}
    flags = {name: value for name, value in given.items() if name not in left_out}
    return {"codebook": args.codebook} | flags


def _widths(text: str) -> tuple[Bits, ...]:
    found = []
    for word in text.split(","):
        try:
            found.append(number(word))
        except (ValueError, OverflowError) as error:
            raise UsageError(
                f"--choices: {shown(word)} is no number of bits, as in --choices 2,3,4"
            ) from error
    return tuple(dict.fromkeys(found))


def _line(args: Arguments, flags: dict[str, object]) -> str:
    """What makes this plan again."""
    own = (
        *("bits", "choices", "by", "checkpoints", "whole_stacks", "head_bits"),
        *("nsamples", "seqlen", "seed"),
    )
    said = {name: getattr(args, name) for name in own if name in args.given}
    words = [args.model, *([args.dataset] if args.dataset else []), *as_line({**said, **flags})]
    return shlex.join(["quip", "plan", *words])
