"""What comes from a file is not trusted: names that become paths, and JSON and YAML of any shape.

Files are bounded in bytes, depth and digits before anything looks at them. A key that stands twice
is refused, for the last would win without a word.
"""

import json
import math
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from quip.errors import Unavailable, UsageError, one_line, shown
from quip.shapes import check_shape

BYTES = 64 << 20  # of a file of words
YAML_BYTES = 1 << 18  # which PyYAML reads in about three seconds
VALUES = 5_000_000  # of a JSON text, so that its bytes bound the memory that it takes
DEPTH = 64  # of lists and mappings inside one another
DIGITS = 25  # of a whole number
NODES = 100_000  # of a YAML document, with what its aliases repeat
NAME_BYTES = 255  # of a file name
PLAIN = (dict, list, str, int, float, bool, type(None))  # YAML has dates and sets as well
NO_NUMBER = "NaN or infinity"
Parser: TypeAlias = Callable[[str], Any]


def inside(folder: Path, name: object, said_by: str) -> Path:
    """The path of a file in a folder by the name that another file, `said_by`, gives it.

    Raises Unavailable for what is no plain name: such a path could be of any file there is.
    """
    plain = (
        isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
    )
    if not plain or len(str(name).encode(errors="replace")) > NAME_BYTES:
        raise Unavailable(
            f"{said_by} names a file {shown(name)}, which is no plain name of one in {folder}; "
            "get the folder again from where it came"
        )
    return folder / str(name)


def check_regular(path: Path) -> None:
    """Raise Unavailable for a path that is neither a file nor a folder, before it is opened.

    A pipe may never begin, and a device may never end. A path that leads nowhere passes: whoever
    opens it says so.
    """
    with suppress(OSError, ValueError):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise Unavailable(f"{path}: neither a file nor a folder; copy its content to a file")


def read_text(path: Path, *, limit: int = BYTES) -> str:
    """A regular file's text, of at most `limit` bytes. Raises Unavailable where it is none."""
    check_regular(path)
    try:
        if (size := path.stat().st_size) > limit:
            raise ValueError(f"it has {size} bytes, above {limit}")
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise Unavailable(f"{path} cannot be read ({one_line(error)})") from error


def read_json(
    path: Path,
    shape: Any = Any,
    *,
    remedy: str,
    parse: Parser | None = None,
    called: str | None = None,
) -> Any:
    """What a JSON file says, which has the declared shape.

    Raises Unavailable, as "PATH is damaged (the key and the reason); REMEDY", for any other; where
    the file is `called` something, that stands for the path.
    """
    text = read_text(path)
    try:
        value = (parse or parse_json)(text)
        check_shape(value, shape)
    except ValueError as error:
        raise Unavailable(f"{called or path} is damaged ({error}); {remedy}") from error
    return value


def read_yaml(path: Path, shape: Any = Any, *, flag: str = "") -> Any:
    """What a YAML file that a user wrote says, which has the declared shape; null if nothing.

    Raises UsageError, as "FLAG PATH: the key and the reason", for any other.
    """
    named = f"{flag} {path}".lstrip()
    try:
        value = parse_yaml(read_text(path, limit=YAML_BYTES))
    except (Unavailable, ValueError) as error:
        raise UsageError(f"{named}: cannot be read as YAML: {error}") from error
    try:
        check_shape(value, shape)
    except ValueError as error:
        raise UsageError(f"{named}: {error}") from error
    return value


def parse_json(
    text: str, shape: Any = Any, *, constants: bool = False, values: float = VALUES
) -> Any:
    """The value of a JSON text of the declared shape; NaN and infinity only with `constants`.

    Of at most so many `values`. Raises ValueError, with the key and the reason on one line.
    """
    if sum(map(text.count, "[{,:")) > values:
        raise ValueError(f"more than {values} values")
    number, constant = (float, float) if constants else (_finite, partial(_refuse, NO_NUMBER))
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=number,
            parse_constant=constant,
        )
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(_reason(error)) from error
    _check_sound(value)
    check_shape(value, shape)
    return value


def parse_yaml(text: str, shape: Any = Any) -> Any:
    """The value of a YAML text of the declared shape; null for one without content.

    Raises ValueError, with the key and the reason on one line.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            return None
        _count(node, {}, yaml.SafeLoader(""))
        value = yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, RecursionError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(_reason(error)) from error
    _check_sound(value)
    check_shape(value, shape)
    return value


def _count(node: Any, known: dict[int, int], loader: yaml.SafeLoader) -> int:
    """How many nodes there are, those of an alias as often as it stands there.

    Raises ValueError for too many, for a key that stands twice, and for a number of many digits.
    """
    if id(node) not in known:
        known[id(node)] = NODES  # what holds itself has no end
        if node.tag.endswith(":int") and len(node.value) > DIGITS:
            _refuse("a number", f"of {len(node.value)} digits")
        if isinstance(node, yaml.MappingNode):
            own = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            _unique([(_key(key, loader), None) for key in own])
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [x for part in parts for x in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_count(part, known, loader) for part in flat)
    if known[id(node)] >= NODES:
        raise ValueError(f"more than {NODES} values, with those that aliases repeat")
    return known[id(node)]


def _key(node: yaml.ScalarNode, loader: yaml.SafeLoader) -> Any:
    """A key as a mapping has it: 16 and 0x10 are one. `<<`, which merges another, is none."""
    merges = node.tag == "tag:yaml.org,2002:merge"
    return node.value if merges else loader.construct_object(node)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"lists or mappings more than {DEPTH} deep"
    return one_line(error)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return found


def _whole(digits: str) -> int:
    return int(digits) if len(digits) <= DIGITS else _refuse("a number", f"of {len(digits)} digits")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(NO_NUMBER, shown(digits))


def _refuse(what: str, *why: str) -> Any:
    raise ValueError(" ".join((what, *why)))


def _check_sound(value: Any) -> None:
    """Raise ValueError for too much depth, text that is no valid Unicode, and YAML's dates."""
    level = [value]
    for _ in range(DEPTH):
        for x in level:
            if isinstance(x, str) and not x.isascii() and re.search("[\ud800-\udfff]", x):
                raise ValueError(f"{shown(x)} is no valid Unicode")
            if type(x) not in PLAIN:
                raise ValueError(f"{shown(x)} is a {type(x).__name__}; put text in quotes")
        level = [part for x in level for part in _parts(x)]
        if not level:
            return
    raise ValueError(f"lists or mappings more than {DEPTH} deep")


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from (*value, *value.values())
    elif isinstance(value, list):
        yield from value
