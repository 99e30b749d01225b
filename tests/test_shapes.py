"""Declared shapes of what a file says."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from quip.shapes import Within, check_shape


@dataclass
class Record:
    names: tuple[str, ...]
    loss: float
    note: str = ""


class Row(TypedDict):
    name: Annotated[str, Within(1, 5)]
    block: Annotated[int, Within(0)]
    note: NotRequired[str | None]


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (3, int),
        (3, float),
        (0.5, float),
        (None, str | None),
        ("a", Literal["a", 2]),
        ({"a": [1, 2]}, dict[str, list[int]]),
        ({"name": "q", "block": 0, "later": object()}, Row),
        ([{"name": "q", "block": 7, "note": None}], list[Row]),
        ({"names": ["q"], "loss": 1}, Record),
        ({"a": None}, dict[str, Row | None]),
        (object(), Any),
    ],
)
def test_what_has_the_shape_is_taken(value: Any, shape: Any):
    check_shape(value, shape)


@pytest.mark.parametrize(
    ("value", "shape", "says"),
    [
        (True, int, "it is True, not a whole number"),
        (1.0, int, "it is 1.0, not a whole number"),
        (True, float, "it is True, not a number"),
        (1, bool, "it is 1, not true or false"),
        (1, Literal[True], "it is 1, not one of True"),
        ("x", float | Literal["nan"], "it is 'x', not a number or one of nan"),
        ([], dict[str, int], "it is [], not a mapping"),
        (5, str | None, "it is 5, not text or null"),
        ([1, "2"], list[int], "[1] is '2', not a whole number"),
        ({"a": {"b c": None}}, dict[str, dict[str, int]], "a.'b c' is None, not a whole number"),
        ({"block": 0}, Row, "name is missing"),
        ([{"name": "q", "block": -1}], list[Row], "[0].block is -1, not from 0 to inf"),
        ([{"name": "", "block": 1}], list[Row], "[0].name is '', not from 1 to 5"),
        ({"names": "q", "loss": 1.0}, Record, "names is 'q', not a list"),
        ({"names": ["q", 1], "loss": 1.0}, Record, "names[1] is 1, not text"),
        ({"names": []}, Record, "loss is missing"),
        ({"a": {"block": 1}}, dict[str, Row | None], "a.name is missing"),
        ({"name": "q", "block": 0, "note": 1}, Row, "note is 1, not text or null"),
    ],
)
def test_what_has_not_is_named_by_its_key(value: Any, shape: Any, says: str):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        check_shape(value, shape)
