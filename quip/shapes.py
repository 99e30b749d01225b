"""What a file may say, declared as a type: TypedDicts, dataclasses, lists, literals and unions.

Numbers and lengths may have limits: Annotated[int, Within(0, 99)]. A dataclass is the mapping of
its fields, a tuple a list.
"""

from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from quip.errors import shown

WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}


@dataclass(frozen=True)
class Within:
    """The least and the greatest number that a file may say; of a text or list, its length."""

    least: int | float
    most: int | float = float("inf")

    def holds(self, value: Any) -> bool:
        return self.least <= (value if isinstance(value, int | float) else len(value)) <= self.most

    def __str__(self) -> str:
        return f"from {self.least:g} to {self.most:g}"


def check_shape(value: Any, shape: Any, where: str = "") -> None:
    """Raise ValueError, as "KEY is THIS, not THAT", unless a value has the declared shape.

    Numbers that are no floats are whole; true and false are no numbers; a tuple is a list. A
    mapping may hold more keys than are declared: files of a later version do.
    """
    origin, parts = get_origin(shape), get_args(shape)
    if shape is Any:
        return
    if origin is Annotated:
        check_shape(value, parts[0], where)
        for limits in parts[1:]:
            if not limits.holds(value):
                raise ValueError(f"{where or 'it'} is {shown(value)}, not {limits}")
    elif origin in (Union, UnionType):
        near = [part for part in parts if _is_of(value, get_origin(part) or part)]
        if len(near) == 1:  # whose own reason says more
            check_shape(value, near[0], where)
        elif not any(_fits(value, part) for part in parts):
            raise _misfit(value, " or ".join(dict.fromkeys(_words(part) for part in parts)), where)
    elif origin is Literal:
        if not any(value == x and type(value) is type(x) for x in parts):
            raise _misfit(value, _words(shape), where)
    elif not _is_of(value, origin or shape):
        raise _misfit(value, _words(shape), where)
    elif _is_record(shape):
        _check_entries(value, shape, where)
    elif origin in (list, tuple):
        for i, part in enumerate(value):
            check_shape(part, parts[0], f"{where}[{i}]")
    elif origin is dict:
        for key, part in value.items():
            check_shape(key, parts[0], f"{where}: a key")
            check_shape(part, parts[1], _below(where, key))


def _check_entries(value: dict[str, Any], shape: Any, where: str) -> None:
    for key, kind in _entries(shape).items():
        if key in value:
            check_shape(value[key], kind, _below(where, key))
        elif key in _required(shape):
            raise ValueError(f"{_below(where, key)} is missing")


@cache
def _entries(shape: Any) -> dict[str, Any]:
    hints = get_type_hints(shape, include_extras=True)
    return {k: get_args(x)[0] if get_origin(x) is NotRequired else x for k, x in hints.items()}


@cache
def _required(shape: Any) -> frozenset[str]:
    if is_typeddict(shape):
        return shape.__required_keys__
    free = [x for x in fields(shape) if x.default is x.default_factory is MISSING]
    return frozenset(x.name for x in free)


def _is_record(shape: Any) -> bool:
    return is_typeddict(shape) or is_dataclass(shape)


def _below(where: str, key: object) -> str:
    name = key if isinstance(key, str) and key.isidentifier() else shown(key)
    return f"{where}.{name}" if where else str(name)


def _fits(value: Any, shape: Any) -> bool:
    try:
        check_shape(value, shape)
    except ValueError:
        return False
    return True


def _is_of(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (dict if _is_record(kind) else list if kind is tuple else kind)


def _words(shape: Any) -> str:
    kind = get_origin(shape) or shape
    if kind is Annotated:
        base, *limits = get_args(shape)
        return " ".join((_words(base), *map(str, limits)))
    if kind is Literal:
        return "one of " + ", ".join(map(str, get_args(shape)))
    kind = dict if _is_record(kind) else list if kind is tuple else kind or NoneType
    return WORDS.get(kind, str(kind))


def _misfit(value: Any, wanted: str, where: str) -> ValueError:
    return ValueError(f"{where or 'it'} is {shown(value)}, not {wanted}")
