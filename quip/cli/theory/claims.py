"""`quip theory`: the papers' theorems, measured beside their formulas."""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from quip.cli.output import aligned, names
from quip.cli.parse import refuse_small
from quip.cli.theory.shared import check_output, output_flags, refuse_sizes, write_and_print
from quip.cli.values import seed
from quip.errors import UsageError

if TYPE_CHECKING:
    from quip.research.theory import Claim

HELP = "measure what the theorems of QuIP state"
EXAMPLES = """
quip theory --out runs/theory
"""
HEAD = ("measured", "std error", "predicted", "ratio", "verdict")


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    add("--n", type=int, default=64, metavar="N", help="columns of W (default 64)")
    add(
        "--rows",
        type=int,
        default=20_000,
        metavar="N",
        help="rows of weights that a mean is taken over (default 20000)",
    )
    add(
        "--samples",
        type=int,
        default=50,
        metavar="N",
        help="Hessians, weights or runs that a supremum or a probability is taken over "
        "(default 50)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of all that is drawn (default 0)")
    add(
        "--only",
        metavar="A,B,...",
        help="groups of claims: theorem1, lemma3, feedback, strictness, lemma2, theorem4, "
        "lemma11, lemma12, lemma13, range, rotation (default: all)",
    )
    output_flags(parser, files="theory.csv, theory.json, equalities.png and bounds.png")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Measure, write, and print."""
    refuse_small(args, n=16, rows=1000, samples=2)  # of fewer rows four standard errors say little
    refuse_sizes([args.n], args.rows)
    check_output(args)

    from quip.research.theory import GROUPS, Settings, measure
    from quip.research.theory.plots import plot_bounds, plot_equalities

    only = tuple(GROUPS) if args.only is None else names(args.only, "--only")
    if unknown := [name for name in only if name not in GROUPS]:
        raise UsageError(f"--only {','.join(unknown)}: not one of {', '.join(GROUPS)}")
    settings = Settings(n=args.n, rows=args.rows, samples=args.samples, seed=args.seed)
    found = measure(settings, only)
    rows = [{"group": group, **c.to_row()} for group, claims in found.items() for c in claims]
    write_and_print(
        args,
        "theory",
        rows,
        text=partial(theory_table, found, {name: GROUPS[name].title for name in found}),
        plots={
            "equalities.png": partial(plot_equalities, found),
            "bounds.png": partial(plot_bounds, found),
        },
    )


def theory_table(found: Mapping[str, Sequence["Claim"]], titles: Mapping[str, str]) -> str:
    """A block for each group, and how many claims came to which verdict."""
    blocks = [
        aligned([(titles[group], *HEAD), *map(_line, claims)]) for group, claims in found.items()
    ]
    verdicts = Counter(c.verdict for claims in found.values() for c in claims)
    counts = ", ".join(f"{verdict} {n}" for verdict, n in verdicts.most_common())
    return "\n\n".join([*blocks, f"{sum(verdicts.values())} claims: {counts}"])


def _line(claim: "Claim") -> tuple[str, ...]:
    return (
        f"  {claim.name}: {claim.quantity} {claim.relation} {claim.formula}",
        f"{claim.measured:.5g}",
        f"{claim.std_error:.1e}" if claim.std_error else "",
        f"{claim.predicted:.5g}",
        f"{claim.ratio:.4f}" if claim.ratio > 0.01 else f"{claim.ratio:.2g}",
        claim.verdict,
    )
