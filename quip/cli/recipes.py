"""`quip recipes`: the named recipes, and the flags that each stands for."""

import argparse
import json

SUMMARY = "list the recipes that --recipe knows"


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Print the list."""
    from quip.matrix.build import RECIPES, as_flags

    if args.json:
        rows = {name: {"title": r.title, "flags": r.flags} for name, r in RECIPES.items()}
        print(json.dumps(rows, indent=2))
        return
    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        print(f"{name:{width}}  {recipe.title}")
        print(f"{'':{width}}  {' '.join(as_flags(recipe.flags))}")
