"""Names that become paths, and JSON and YAML of any shape."""

import os
import re
from pathlib import Path

import pytest

from quip.errors import Unavailable, UsageError
from quip.reading import (
    DEPTH,
    check_regular,
    inside,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
    read_yaml,
)

NAMES = ["../a", "/etc/passwd", "a/b", "a\\b", "", ".", "..", "a\0b", "a" * 300, None, 5, ["a"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_plain_one_becomes_no_path(name: object, tmp_path: Path):
    with pytest.raises(Unavailable, match=r"^index.json names a file .*, which is no plain name"):
        inside(tmp_path, name, "index.json")


def test_a_plain_name_is_one_of_the_folder(tmp_path: Path):
    name = "model.layers.0.q_proj.safetensors"
    assert inside(tmp_path, name, "manifest.json") == tmp_path / name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 200_000, f"lists or mappings more than {DEPTH} deep"),
        ("[" * 100 + "]" * 100, f"lists or mappings more than {DEPTH} deep"),
        ('{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        ("9" * 5_000, "a number of 5000 digits"),
        ('["NaN", NaN]', "NaN or infinity NaN"),
        ("1e999", "NaN or infinity '1e999'"),
        ("[" + 6_000_000 * "1," + "1]", "more than 5000000 values"),
        ('"\\ud800"', "'\\ud800' is no valid Unicode"),
        ('{"\\ud800": 1}', "'\\ud800' is no valid Unicode"),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("", "Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_json_that_is_no_json_is_refused_in_a_line(text: str, says: str):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        parse_json(text)


BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(10)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "more than 100000 values, with those that aliases repeat"),
        ("&a [*a]", "more than 100000 values, with those that aliases repeat"),
        ("a: 1\nb: {c: 1, c: 2}", "the key 'c' stands there twice"),
        ("{16: a, 0x10: b}", "the key 16 stands there twice"),
        ("9" * 4_000, "a number of 4000 digits"),
        ("a: 2020-01-01", "datetime.date(2020, 1, 1) is a date; put text in quotes"),
        ("!!set {a, b}", "is a set; put text in quotes"),
        ("2020-99-99", "month must be in 1..12"),
        ("[" * 5_000, f"lists or mappings more than {DEPTH} deep"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("{[1]: 2}", "while constructing a mapping"),
        ("a: \x00", "unacceptable character"),
        ("a\nb: c", "mapping values are not allowed"),
        ('a: !!int ""', "string index out of range"),
        ('!!int "": 1', "string index out of range"),
        ("a: !!bool foo", "foo"),
        ("a: !!timestamp x", "groupdict"),
    ],
)
def test_yaml_that_is_no_yaml_is_refused_in_a_line(text: str, says: str):
    with pytest.raises(ValueError, match=r"\A.*\Z") as error:
        parse_yaml(text)
    assert says in str(error.value)
    assert len(str(error.value)) < 300


def test_what_is_plain_is_read():
    assert parse_json('{"a": [1, 2.5, null, "ä"]}') == {"a": [1, 2.5, None, "ä"]}
    assert parse_json("[NaN]", constants=True)[0] != 0
    assert parse_yaml("a: &x {b: [1, true]}\nc: *x") == {
        "a": {"b": [1, True]},
        "c": {"b": [1, True]},
    }
    assert parse_yaml("") is None
    assert parse_yaml("{1: a, '1': b}") == {1: "a", "1": "b"}


def test_a_mapping_that_merges_another_may_say_its_keys_anew():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\nd: *b"
    assert parse_yaml(text) == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 3, "y": 2},
        "c": {"x": 3, "y": 4},
        "d": {"x": 3, "y": 2},
    }


def test_a_file_of_another_shape_is_named_with_its_key_and_the_remedy(tmp_path: Path):
    path = tmp_path / "run.json"
    path.write_text('{"seed": [1]}')
    with pytest.raises(Unavailable) as error:
        read_json(path, dict[str, int], remedy="run it again")
    assert str(error.value) == f"{path} is damaged (seed is [1], not a whole number); run it again"
    with pytest.raises(UsageError) as error:
        read_yaml(path, dict[str, int], flag="--plan")
    assert str(error.value) == f"--plan {path}: seed is [1], not a whole number"


def test_what_is_no_file_of_this_size_is_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"x" * 11)
    (tmp_path / "bytes").write_bytes(b"\xff")
    for path, says in {
        tmp_path / "pipe": "neither a file nor a folder",
        Path("/dev/zero"): "neither a file nor a folder",
        tmp_path: "bytes, above 10",
        tmp_path / "none": "No such file",
        tmp_path / "long": "it has 11 bytes, above 10",
        tmp_path / "bytes": "can't decode byte",
    }.items():
        with pytest.raises(Unavailable, match=says):
            read_text(path, limit=10)


def test_only_files_and_folders_are_opened(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "link", ".", "missing", "loop", "x" * 300):  # the last three by others
        check_regular(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "to_pipe", Path("/dev/zero")):
        with pytest.raises(Unavailable, match="neither a file nor a folder"):
            check_regular(path)
