"""`quip equivalence`: OPTQ and LDLQ run side by side, code by code."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from quip.cli.output import aligned, numbers
from quip.cli.theory.shared import (
    check_output,
    columns,
    output_flags,
    refuse_sizes,
    rows_flag,
    write_and_print,
)
from quip.cli.values import seed

if TYPE_CHECKING:
    from quip.research.theory.equivalence import Comparison

HELP = "OPTQ and LDLQ give the same codes (QuIP, Theorem 6)"
EXAMPLES = """
quip equivalence --n 64,256,1000 --out runs/equivalence
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    columns(parser, "1000")
    rows_flag(parser, None)
    add(
        "--wbits",
        default="none,4,2",
        metavar="A,B,...",
        help="bits of the grids, 1 to 8; none for all whole numbers (default none,4,2)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of weights and inputs (default 0)")
    add(
        "--dtype",
        default="float64",
        choices=["float64", "float32"],
        help="what both compute in (default float64; in float32 ties may fall to either side)",
    )
    output_flags(parser, files="equivalence.csv, equivalence.json, differences.png and sizes.png")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Compare, write, and print."""
    sizes = numbers(args.n, "--n", least=2)
    grids = [
        None if word == "none" else numbers(word, "--wbits", least=1, most=8)[0]
        for word in args.wbits.split(",")
    ]
    refuse_sizes(sizes, args.rows)
    check_output(args)

    import torch

    from quip.research.theory.equivalence import compare_all, plot_differences, plot_sizes

    dtype = getattr(torch, args.dtype)
    found = list(compare_all(sizes, grids, rows=args.rows, seed=args.seed, dtype=dtype))
    plots = {"differences.png": partial(plot_differences, found)}
    if len(set(sizes)) > 1:
        plots["sizes.png"] = partial(plot_sizes, found)
    rows = [comparison.to_row() for comparison in found]
    write_and_print(args, "equivalence", rows, text=partial(equivalence_table, found), plots=plots)


def equivalence_table(found: Sequence["Comparison"]) -> str:
    """A line for each size and grid."""
    head = (
        *("rows x n", "grid", "differing codes", "largest difference", "nearest tie"),
        *("loss, OPTQ", "loss, LDLQ", "s, OPTQ", "s, LDLQ"),
    )
    lines = [
        (
            f"{c.rows} x {c.n}",
            c.grid,
            str(c.differing_codes),
            f"{c.largest_difference:.1e}",
            f"{c.nearest_tie:.1e}",
            f"{c.loss_optq:.9g}",
            f"{c.loss_ldlq:.9g}",
            f"{c.seconds_optq:.2f}",
            f"{c.seconds_ldlq:.2f}",
        )
        for c in found
    ]
    return (
        "The largest difference is that of what is rounded to codes, in code units.\n\n"
        + aligned([head, *lines])
    )
