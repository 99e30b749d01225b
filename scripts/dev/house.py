"""The tree of the package, read off the docstrings of its modules."""

import ast
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
WIDTH = 98  # of a line that a page shows whole
LISTED_ELSEWHERE = ("cli",)  # rooms whose files docs/commands.md has, a command each


def tree() -> str:
    """Every room from the top floor down: its phrase, then its files, without their `.py`."""
    lines = ["quip/"]
    for room in floors():
        folder = ROOT / "quip" / room
        lines += _hung(f"  {room}/", phrase(folder / "__init__.py"))
        if room not in LISTED_ELSEWHERE:
            lines += _hung("", " ".join(_contents(folder)), indent=4)
    return "```\n" + "\n".join(lines) + "\n```\n"


def rooms() -> str:
    """The staircase: a room a line, the highest first."""
    lines = [
        f"{number}. [`{room}/`](../quip/{room}): {phrase(ROOT / 'quip' / room / '__init__.py')}"
        for number, room in enumerate(floors(), start=1)
    ]
    return "\n".join(lines) + "\n"


def files() -> str:
    """Every file of every room with its phrase."""
    lines = ["```", "quip/"]
    for room in ["", *floors()]:
        folder = ROOT / "quip" / room
        if room:
            lines.append(f"  {room}/")
        found = folder.rglob("*.py") if room else folder.glob("*.py")
        for path in sorted(found, key=_place):
            if path != folder / "__init__.py":
                name = str(path.relative_to(folder)).removesuffix("__init__.py")
                lines += _hung(f"  {'  ' if room else ''}{name}", phrase(path), indent=30)
    return "\n".join([*lines, "```"]) + "\n"


def floors() -> list[str]:
    """The rooms in the order of the contract in pyproject.toml, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    staircase = next(c for c in contracts["contracts"] if c["name"] == "the staircase")
    names = [name for floor in staircase["layers"] for name in floor.split(" | ")]
    return [name for name in names if (ROOT / "quip" / name).is_dir()]


def phrase(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n")[0].removesuffix(".")


def _place(path: Path) -> str:
    """By name, and what a folder is before what it holds."""
    return str(path).removesuffix("__init__.py")


def _contents(folder: Path) -> list[str]:
    files = sorted(p.stem for p in folder.glob("*.py") if p.name != "__init__.py")
    return files + sorted(f"{p.parent.name}/" for p in folder.glob("*/__init__.py"))


def _hung(name: str, text: str, indent: int = 14) -> list[str]:
    """The name, and the text beside it, on as many lines as it needs."""
    if not text:
        return [name] if name else []
    body = textwrap.wrap(text, WIDTH - indent, break_on_hyphens=False)
    first = f"{name:<{indent}}" if len(name) < indent else f"{name} "
    return [first + body[0], *(" " * indent + line for line in body[1:])]
