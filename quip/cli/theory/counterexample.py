"""`quip counterexample`: where a finite grid makes OPTQ's feedback worse than none."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from quip.cli.output import aligned, names, numbers
from quip.cli.theory.shared import (
    check_output,
    columns,
    output_flags,
    refuse_sizes,
    rows_flag,
    write_and_print,
)
from quip.errors import UsageError

if TYPE_CHECKING:
    from quip.research.theory.counterexample import Size

HELP = "the finite grid on which OPTQ is worse than plain rounding (QuIP, C.3)"
EXAMPLES = """
quip counterexample --n 16,64,256,1024 --out runs/counterexample
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    columns(parser, "16,64,256,1024")
    rows_flag(parser, 16)
    add("--wbits", type=int, default=4, choices=range(1, 9), metavar="{1..8}", help="(default 4)")
    add("--c", type=float, default=0.01, metavar="X", help="of the construction (default 0.01)")
    add(
        "--quant",
        metavar="A,B,...",
        help="gptq (first column to last, clamped to the grid), unclamped (the same without the "
        "ends of the grid), gptq+greedy (and 10 greedy passes), or any method of `quip run` "
        "(default: all)",
    )
    output_flags(parser, files="counterexample.csv, .json and .png")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Measure, write, and print."""
    sizes = numbers(args.n, "--n", least=3)
    if not 0 < args.c < 1:
        raise UsageError(f"--c {args.c}: a number between 0 and 1 is needed")
    refuse_sizes(sizes, args.rows)
    check_output(args)

    from quip.research.theory.counterexample import VARIANTS, measure, plot_losses

    wanted = tuple(VARIANTS) if args.quant is None else names(args.quant, "--quant")
    if unknown := [name for name in wanted if name not in VARIANTS]:
        raise UsageError(f"--quant {','.join(unknown)}: not one of {', '.join(VARIANTS)}")
    found = list(measure(sizes, wanted, rows=args.rows, bits=args.wbits, c=args.c))
    write_and_print(
        args,
        "counterexample",
        [size.to_row() for size in found],
        text=partial(counterexample_table, found),
        plots={"counterexample.png": partial(plot_losses, found)},
    )


def counterexample_table(found: Sequence["Size"]) -> str:
    """tr(E H E^T) in squared code units: a line a size, a column a method."""
    methods = tuple(found[0].losses)
    head = ("n", "rows", *methods, "tr D / tr H")
    lines = [
        (
            str(size.n),
            str(size.rows),
            *(f"{size.losses[name]:.6g}" for name in methods),
            f"{size.trace_ratio:.4f}",
        )
        for size in found
    ]
    return "tr(E H E^T), W in code units\n\n" + aligned([head, *lines])
