"""`quip proxy MODEL STORE`: the proxy loss of each matrix by each method, without perplexities."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quip.cli.flags import add_flag
from quip.cli.machine import machine_flags
from quip.cli.output import aligned, names
from quip.cli.parse import Arguments, refuse_both
from quip.cli.streams import say
from quip.cli.values import place, seed
from quip.codebooks.names import CODEBOOKS, INTEGERS, Bits
from quip.errors import UsageError
from quip.jobs.requests import request
from quip.matrix.flags import FLAGS
from quip.matrix.methods import METHODS
from quip.matrix.said import number

if TYPE_CHECKING:
    from quip.research.losses.bench import ProxyBench

HELP = "compare methods by their proxy losses, matrix by matrix"
EXAMPLES = """
quip proxy demo demo-hessians --processing baseline,incoherence --out runs/demo-proxy
"""
OF_ALL = ("npasses", "percdamp", "rho", "faithful", "range")  # of each recipe
OF_TRELLIS = ("trellis_code", "trellis_states", "tile")


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    add("model", type=place, metavar="MODEL", help="as for `quip run`")
    add("store", type=Path, metavar="STORE", help="its Hessians, from `quip hessians ... --save`")
    add_flags(parser)
    parser.set_defaults(call=call)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All but MODEL and STORE."""
    _case_flags(parser.add_argument_group("what is compared"))
    group = parser.add_argument_group("method, of all that are compared")
    for name in (*OF_ALL, *OF_TRELLIS):
        add_flag(group, name)
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of rotations (default 0)")
    group = parser.add_argument_group("machine and output")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with --out: what it holds is kept; more methods, bits or layers may be named",
    )
    machine_flags(
        group,
        out="a folder for run.json, proxy.csv (a line for each matrix and method, kept after each "
        "input), summary.csv, depth.png and methods.png; it must be new or empty",
    )


def _case_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--quant", default="all", metavar="A,B,...", help="methods, or all (the default)")
    add(
        "--wbits",
        metavar="B,...",
        help="bits per weight, of what has none of its own (default 2,3,4)",
    )
    add(
        "--processing",
        metavar="A,B",
        help="baseline (the default), incoherence, or both: baseline,incoherence",
    )
    add(
        "--incoh_processing",
        action="store_true",
        help="short for --processing incoherence",
    )
    add(
        "--codebook",
        default=INTEGERS,
        metavar="A,B,...",
        help="int (the default), vq, trellis, and lattices, which have their own bits; q, k and v "
        "are not fused",
    )
    add(
        "--layers",
        metavar="PATTERN,...",
        help="matrices by any run of the parts of their names, with wildcards: fc1, layers.0, "
        "layers.*.q_proj (default: all of the store)",
    )


def call(args: Arguments) -> None:
    """Measure, and print the means."""
    bench = asked(args)

    from quip.research.losses.bench import measure_losses
    from quip.research.losses.rows import method_tables

    losses = measure_losses(bench)
    measures = {"mean_proxy_loss": "mean proxy loss", "mean_absolute_loss": "mean tr(E H E^T)"}
    for measure, title in measures.items():
        for lines in method_tables(losses, measure, title):
            say(aligned(lines), end="\n\n")
    count = len({loss.name for loss in losses})
    say(f"over {count} matrices" + (f"; each of them in {args.out}" if args.out else ""))


def asked(args: Arguments) -> "ProxyBench":
    """What the strings mean. Raises UsageError for what means nothing."""
    _refuse(args)

    from quip.research.losses.bench import ProxyBench

    return request(
        ProxyBench,
        args,
        quants=tuple(METHODS) if args.quant == "all" else names(args.quant, "--quant"),
        wbits=_numbers(args.wbits or "2,3,4", "--wbits"),
        processing=_processing(args),
        codebooks=names(args.codebook, "--codebook"),
        flags=_flags(args),
        layers=names(args.layers, "--layers") if args.layers else (),
    )


def _refuse(args: Arguments) -> None:
    for flag in ("resume", "overwrite"):
        if getattr(args, flag) and args.out is None:
            raise UsageError(f"--{flag} speaks of a folder: name it with --out DIR")
    refuse_both(args)
    books = [CODEBOOKS[name] for name in args.codebook.split(",") if name in CODEBOOKS]
    if args.wbits and books and all(book.only_bits for book in books):
        raise UsageError(f"--wbits {args.wbits}: lattices have their own bits; leave it out")


def _processing(args: Arguments) -> tuple[str, ...]:
    if args.incoh_processing and args.processing:
        raise UsageError(
            "--incoh_processing is short for --processing incoherence: leave one of them out"
        )
    if args.incoh_processing:
        return ("incoherence",)
    return names(args.processing or "baseline", "--processing")


def _flags(args: Arguments) -> dict[str, Any]:
    """The flags of a recipe that were given, by the names of `quip.matrix.flags.Flags`."""
    given = {FLAGS[name].name: getattr(args, name) for name in (*OF_ALL, *OF_TRELLIS)}
    return {name: value for name, value in given.items() if value is not None}


def _numbers(text: str, flag: str) -> tuple[Bits, ...]:
    try:
        return tuple(number(word) for word in names(text, flag))
    except ValueError:
        raise UsageError(f"{flag} {text}: numbers are needed, as in {flag} 2,3") from None
