"""A line, a --config file and a --recipe become one namespace; errors one line with a status."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import quip
from quip.cli import ranks, values
from quip.cli.ends import Tell, ranked
from quip.cli.interrupts import Interrupts, noticed
from quip.cli.lines import INTERRUPTED
from quip.cli.streams import ReaderLeft, say, set_up_streams
from quip.errors import QuipError, UsageError, shown
from quip.matrix.flags import FLAGS
from quip.matrix.methods import RECIPES
from quip.matrix.said import as_line
from quip.reading import read_yaml

NOT_IN_FILES = ("model", "dataset", "config", "call")
UNSET: list[object] = []  # a list, since what appends to a value copies it first
# What a flag's `type` stands for: one rule for every number, text and path of a line.
READ: dict[Any, Callable[[str], Any]] = {
    None: values.readable,
    int: values.whole,
    Path: values.path,
    values.seed: values.seed,
    values.place: values.place,
    values.share_or_auto: values.share_or_auto,
}
LARGEST = {"nsamples": 1_000_000, "samples": 100_000}  # what would take years, or all memory


class Arguments(argparse.Namespace):
    """The values of all flags; `given` are the names of those that were said, wherever."""

    __slots__ = ("given",)  # and so not among the values, which go into reports
    given: set[str]


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line, like all others, instead of a page of usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | options)
        for kind, read in READ.items():
            self.register("type", kind, _reader(kind, read))

    def _print_message(self, message: str, file: Any = None) -> None:
        say(message, end="")  # --help and --version: there is no other message

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


class Version(argparse.Action):
    """Print the version of this package, which is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            say(f"quip {quip.__version__}")
        except ModuleNotFoundError:  # what the lookup raises of a package without metadata
            say("quip, of a checkout that is not installed")
        parser.exit()


def _reader(kind: Any, read: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, which would put words of its own in the place of any other error's."""

    def reads(word: str) -> Any:
        try:
            return read(word)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    reads.__name__ = getattr(kind, "__name__", "str")
    return reads


def guarded(parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse and run; what a user can mend becomes one line and an exit status (2: usage)."""
    set_up_streams()
    _quiet_libraries()
    line = list(sys.argv[1:] if argv is None else argv)
    with noticed() as interrupts:
        return ranked(lambda tell: _run(parser, line, interrupts, tell))


def _run(parser: Parser, line: list[str], interrupts: Interrupts, tell: Tell) -> int:
    args = None
    try:
        with ranks.quiet_others():
            _set_up_logging()
            args = parse(parser, line)
            args.call(args)
    except QuipError as error:
        if interrupts.came:  # as when half a library was imported, and is said to be missing
            return _interrupted(args, tell)
        status = 2 if isinstance(error, UsageError) else 1
        tell(values.bounded(" ".join(str(error).split())), status)
        return status
    except KeyboardInterrupt:
        return _interrupted(args, tell)
    except ReaderLeft:
        return 0
    except Exception:
        if interrupts.came:
            return _interrupted(args, tell)
        raise
    return 0


def _interrupted(args: Arguments | None, tell: Tell) -> int:
    tell(f"interrupted{_to_resume(args)}", INTERRUPTED)
    return INTERRUPTED


def _to_resume(args: Arguments | None) -> str:
    """What to do after an interruption, where --resume would take the work up."""
    given = vars(args) if args else {}
    folder = given.get("out", given.get("save"))  # a store is its own folder
    unquantized = given.get("wbits") == 16 and not given.get("plan")  # by `quip run`
    if "resume" not in given or folder is None or unquantized:
        return ""
    return f"; the same line with --resume goes on with what {folder} holds by now"


def _quiet_libraries() -> None:
    """Libraries stay silent below errors, unless the environment asks for more.

    A hub out of reach is retried with two lines a time, which would bury ours. They look here when
    they are imported.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def _set_up_logging() -> None:
    """Our own lines to stderr: progress bars on a terminal, a line for each matrix elsewhere."""
    log = logging.getLogger("quip")
    log.handlers = [logging.StreamHandler(sys.stderr)]
    log.setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)


def parse(parser: Parser, line: list[str]) -> Arguments:
    """The line, with what its --recipe and its --config files stand for before its own flags.

    So its own win over those of files, a later file over an earlier one, and files over a recipe.
    """
    args = parser.parse_args(line)
    found: dict[str, bool | str] = {}
    for path in getattr(args, "config", None) or []:
        found |= _of_file(path, parser, vars(args).keys() - set(NOT_IN_FILES))
        try:
            args = parser.parse_args([*_words(found), *line])
        except UsageError as error:
            raise UsageError(f"--config {path}: {error}") from error
    words = [*_of_recipe(getattr(args, "recipe", None), vars(args)), *_words(found), *line]
    unset = Arguments(**dict.fromkeys(vars(args), UNSET))
    said = parser.parse_args(words, unset)
    args = parser.parse_args(words, Arguments())
    args.given = {name for name, value in vars(said).items() if value is not UNSET}
    return args


def _of_recipe(name: str | None, known: Collection[str]) -> list[str]:
    """What the recipe stands for on a line of a command that has these flags."""
    if name is None:
        return []
    if name not in RECIPES:
        raise UsageError(f"--recipe {shown(name)}: not one of {', '.join(RECIPES)}")
    named = RECIPES[name]
    return as_line(named.flags | {flag: x for flag, x in named.run.items() if flag in known})


def _of_file(path: Path, parser: Parser, known: set[str]) -> dict[str, bool | str]:
    """What the file says: of switches true or false, of other flags the word on a line."""
    loaded = read_yaml(path, flag="--config") or {}
    if not isinstance(loaded, dict):
        raise UsageError(f"--config {path}: a mapping of flag names to values is expected")
    found: dict[str, bool | str] = {}
    for name, value in loaded.items():
        if name not in known:
            raise UsageError(
                f"--config {path}: unknown name {shown(name)}; names are those of flags"
            )
        if isinstance(parser.get_default(name), bool):
            if not isinstance(value, bool):
                raise UsageError(
                    f"--config {path}: {name} is a switch: say true or false, not {shown(value)}"
                )
            found[name] = value
        elif value is not None:
            found[name] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return found


def _words(found: Mapping[str, bool | str]) -> list[str]:
    """As on a line, where only what a recipe may have switched on can be switched off."""
    return as_line({k: v for k, v in found.items() if v is not False or k in FLAGS})


def refuse_small(args: argparse.Namespace, **least: int) -> None:
    """Raise UsageError for a number below what is needed at least, or above what makes sense."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not value >= low:  # NaN is neither
            raise UsageError(f"--{name} {value}: at least {low} is needed")
        if value is not None and value > (most := LARGEST.get(name, values.MOST)):
            raise UsageError(f"--{name} {value}: at most {most:,} make sense")


def refuse_both(args: argparse.Namespace) -> None:
    """Raise UsageError for --resume with --overwrite."""
    if args.resume and args.overwrite:
        raise UsageError("--resume goes on and --overwrite starts over: leave one out")


def as_given(args: argparse.Namespace) -> dict[str, Any]:
    """The flags for the report; that there is no plan is not said, as before there were any."""
    given = {name: value for name, value in vars(args).items() if name != "call"}
    return {name: value for name, value in given.items() if name != "plan" or value is not None}
