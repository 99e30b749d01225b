"""What every command shares: options from a file, and errors as one line with a status."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from quip.errors import QuipError, UsageError


def guarded(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse and run; what a user can mend becomes one line and an exit status (2: usage)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    args = parser.parse_args(argv)
    try:
        args.call(args)
    except QuipError as error:
        print(f"quip: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("quip: interrupted", file=sys.stderr)
        return 130
    return 0


class FromFile(argparse.Action):
    """`--config FILE`: YAML of the same names; flags that follow it on the line win."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        path = Path(str(values))
        try:
            loaded = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            parser.error(f"--config {path}: {' '.join(str(error).split())}")
        if not isinstance(loaded, dict):
            parser.error(f"--config {path}: a mapping of flag names to values is expected")
        flags = {
            option.lstrip("-"): action
            for action in parser._actions
            for option in action.option_strings
            if option.startswith("--") and action.dest not in ("help", "config")
        }
        for name, value in loaded.items():
            if name not in flags:
                parser.error(f"--config {path}: unknown name {name!r}; names are those of flags")
            setattr(namespace, flags[name].dest, _checked(parser, flags[name], name, value))


def _checked(
    parser: argparse.ArgumentParser, action: argparse.Action, name: str, value: object
) -> object:
    """A value of the file as the flag would have parsed it."""
    if value is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            parser.error(f"--config: {name} is a switch: say true or false, not {value!r}")
        return value
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    parsed = parser._get_value(action, text)
    parser._check_value(action, parsed)
    return parsed
