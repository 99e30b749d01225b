"""The commands and flags of the command line as Markdown, read off its parsers."""

import argparse
import re
from collections.abc import Iterable, Iterator

from quip.cli import COMMANDS, parser_of
from quip.cli.parse import Parser
from quip.matrix.said import number


def commands() -> str:
    """Every command with its line of help."""
    lines = ["| command | what it does |", "|---|---|"]
    lines += [
        f"| [`quip {name}`](#quip-{name}) | {_quoted(c.HELP)} |" for name, c in COMMANDS.items()
    ]
    return "\n".join(lines) + "\n"


def command(name: str) -> str:
    """The line of a command, and a table of its flags by group."""
    parser = built(name)
    groups = [(g.title, list(_shown(g._group_actions))) for g in parser._action_groups]
    examples = COMMANDS[name].EXAMPLES.strip()
    lines = [
        f"`{_usage(name, parser)}`",
        "",
        f"```\n{examples}\n```",
        "",
        "| flag | meaning |",
        "|---|---|",
    ]
    for title, actions in groups:
        if actions and title not in ("positional arguments", "options"):
            lines.append(f"| **{title}** | |")
        lines += [f"| {_names(action)} | {_meaning(parser, action)} |" for action in actions]
    return "\n".join(lines) + "\n"


def built(name: str) -> Parser:
    """The parser of one command."""
    return parser_of(name)


def _shown(actions: Iterable[argparse.Action]) -> Iterator[argparse.Action]:
    for action in actions:
        if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS:
            yield action


def _usage(name: str, parser: Parser) -> str:
    """The command with what it cannot do without."""
    if shown := getattr(COMMANDS[name], "USAGE", None):
        return shown
    words = ["quip", name]
    for action in _shown(parser._actions):
        word = _positional(action) if not action.option_strings else action.option_strings[0]
        if action.option_strings and action.required:
            words.append(f"{word} {action.metavar or action.dest.upper()}")
        elif not action.option_strings:
            words.append(word if action.required else f"[{word}]")
    return " ".join(words)


def _positional(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper())


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{_positional(action)}`"
    takes = action.nargs != 0
    value = action.metavar or ("N" if action.type in (int, number) else "NAME")
    return ", ".join(f"`{o} {value}`" if takes else f"`{o}`" for o in action.option_strings)


def _meaning(parser: Parser, action: argparse.Action) -> str:
    """The help, with the choices and the default where it does not name them."""
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    if action.choices:
        missing = [c for c in action.choices if str(c) not in text]
        if missing and action.metavar is None:
            text += f"; one of {_spoken(list(action.choices))}"
    default = action.default
    if default not in (None, False, True, argparse.SUPPRESS) and "default" not in text:
        text += f" (default {default})"
    return _quoted(text.removeprefix("; ")).replace("|", r"\|")


def _quoted(text: str) -> str:
    """Flags as code, but for those that stand in code already."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"(?<![\w-])--[a-zA-Z][\w-]*", r"`\g<0>`", part) for part in parts[::2]]
    return "`".join(parts)


def _spoken(choices: list[object]) -> str:
    """The choices in words; three or more whole numbers in a row as a span."""
    found: list[str] = []
    while choices:
        run = 1
        while run < len(choices) and choices[run] == _plus(choices[0], run):
            run += 1
        if run >= 3:
            found.append(f"{choices[0]} to {choices[run - 1]}")
        else:
            run = 1
            found.append(f"`{choices[0]}`" if isinstance(choices[0], str) else str(choices[0]))
        choices = choices[run:]
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1])))


def _plus(first: object, steps: int) -> object:
    return first + steps if isinstance(first, int) else None
