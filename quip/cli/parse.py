"""What every command shares: options from a file, and errors as one line with a status."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from quip.errors import QuipError, UsageError


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line, like all others, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help explains every flag)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, also an argument that may be left out behind flags that stand before it.

        argparse does so since Python 3.12.7; before, it settles such an argument with the first.
        """
        found, rest = super().parse_known_args(args, namespace)
        for action in self._get_positional_actions():
            missing = action.nargs == "?" and getattr(found, action.dest) is None
            if missing and len(rest) == 1 and (rest[0] == "-" or not rest[0].startswith("-")):
                setattr(found, action.dest, rest.pop())
        return found, rest


def guarded(parser: Parser, argv: Sequence[str] | None, *, commands: int = 0) -> int:
    """Parse and run; what a user can mend becomes one line and an exit status (2: usage).

    The first `commands` words of the line name a command; flags from a file go behind them.
    """
    _set_up_logging()
    try:
        args = _parse(parser, list(sys.argv[1:] if argv is None else argv), commands)
        args.call(args)
    except QuipError as error:
        print(f"quip: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("quip: interrupted", file=sys.stderr)
        return 130
    return 0


def _set_up_logging() -> None:
    """Our own lines to stderr: progress bars on a terminal, a line for each matrix elsewhere.

    The libraries stay silent below errors (a hub out of reach is retried with two lines a time,
    which would bury ours), unless the environment asks for more.
    """
    terminal = sys.stderr.isatty()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")
    log = logging.getLogger("quip")
    log.handlers = [logging.StreamHandler(sys.stderr)]
    log.setLevel(logging.WARNING if terminal else logging.INFO)


def _parse(parser: Parser, argv: list[str], commands: int) -> argparse.Namespace:
    """The line, with what its --recipe and its --config files stand for before its own flags.

    So its own win, and those of a file over those of a recipe.
    """
    args = parser.parse_args(argv)
    files = getattr(args, "config", None) or []
    flags: list[str] = []
    for path in files:
        flags += _flags(path, vars(args))
        try:
            args = parser.parse_args([*argv[:commands], *flags, *argv[commands:]])
        except UsageError as error:
            raise UsageError(f"--config {path}: {error}") from error
    if getattr(args, "recipe", None):
        flags = [*_of_recipe(args.recipe), *flags]
        args = parser.parse_args([*argv[:commands], *flags, *argv[commands:]])
    return args


def _of_recipe(name: str) -> list[str]:
    from quip.matrix.build import RECIPES, as_flags

    if name not in RECIPES:
        raise UsageError(f"--recipe {name}: not one of {', '.join(RECIPES)}")
    return as_flags(RECIPES[name].flags)


def _flags(path: Path, known: dict[str, object]) -> list[str]:
    """The file's values as they would stand on the line."""
    try:
        loaded = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: cannot be read as YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise UsageError(f"--config {path}: a mapping of flag names to values is expected")
    flags = []
    for name, value in loaded.items():
        if name not in known or name in NOT_IN_FILES:
            raise UsageError(f"--config {path}: unknown name {name!r}; names are those of flags")
        if isinstance(known[name], bool):
            if not isinstance(value, bool):
                raise UsageError(
                    f"--config {path}: {name} is a switch: say true or false, not {value!r}"
                )
            flags += [f"--{name}"] if value else []
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            flags.append(f"--{name}={text}")
    return flags


NOT_IN_FILES = ("model", "dataset", "config", "call")
