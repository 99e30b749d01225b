"""`quip recipes`: the named recipes and the methods, and the flags that each stands for."""

import argparse
import json

from quip.cli.streams import say
from quip.matrix.methods import METHODS, RECIPES, Named
from quip.matrix.said import as_line

HELP = "list the recipes that --recipe knows, and the methods of --quant"
EXAMPLES = """
quip recipes
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Print the list."""
    methods = {
        name: Named(title=method.title, flags={"quant": name}) for name, method in METHODS.items()
    }
    known = {**RECIPES, **methods}
    if args.json:
        rows = {name: {"title": r.title, "flags": r.every} for name, r in known.items()}
        say(json.dumps(rows, indent=2))
        return
    width = max(map(len, known))
    titles = {"recipes (--recipe NAME)": RECIPES, "methods (--quant NAME)": methods}
    for title, listed in titles.items():
        say(title)
        for name, row in listed.items():
            say(f"  {name:{width}}  {row.title}")
            say(f"  {'':{width}}  {' '.join(as_line(row.every))}")
