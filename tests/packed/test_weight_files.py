"""The safetensors files of a folder: their names, their headers, and what damage is called."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from quip.errors import Unavailable
from quip.packed.files import header, naming_damage, opened, weight_bytes, weight_files

TENSORS = {
    "a": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_a_header_tells_what_a_file_holds_and_each_tensor_can_be_read(path):
    found = header(path)
    assert {name: (x.shape, x.dtype, x.nbytes) for name, x in found.items()} == {
        "a": ((2, 3), "I32", 24),
        "b": ((5,), "BF16", 10),
        "none": ((0, 4), "F32", 0),
    }
    assert all(torch.equal(x.read(), TENSORS[name]) for name, x in found.items())
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + length + sum(x.nbytes for x in found.values())


@pytest.mark.parametrize("left", [0, 4, 60, -1])
def test_a_truncated_file_is_named_with_the_remedy_of_whoever_reads_it(path, left):
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(Unavailable, match=r"^model.safetensors is damaged or truncated \(.+\); "):
        header(path)
    with (
        pytest.raises(Unavailable, match=r"^it is broken \(.+\); start over$"),
        opened(path, "it is broken", "start over"),
    ):
        pass


def test_what_is_no_damage_is_not_called_so():
    with pytest.raises(ZeroDivisionError), naming_damage("a file is damaged", "start over"):
        raise ZeroDivisionError


def test_the_files_are_those_of_the_index_where_there_is_no_single_one(tmp_path, path):
    parts = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    words = {"weight_map": {"b": parts[1].name, "a": parts[0].name, "c": parts[0].name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(words))
    assert weight_files(tmp_path) == [path]
    size = path.stat().st_size
    path.rename(parts[0])
    with pytest.raises(Unavailable, match=r"^there is no model-00002-of-00002.safetensors; "):
        weight_files(tmp_path)
    save_file(TENSORS, parts[1], metadata={"format": "pt"})
    assert weight_files(tmp_path) == parts
    assert weight_bytes(tmp_path) == 2 * size


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "{}",
            r"^model.safetensors.index.json is damaged \(weight_map is missing\); download or save",
        ),
        ("[]", r"is damaged \(it is \[\], not a mapping\)"),
        ('{"weight_map": [null]}', r"is damaged \(weight_map is \[None\], not a mapping\)"),
        ('{"weight_map": {}}', r"is damaged \(weight_map is {}, not from 1 to inf\)"),
        ('{"weight_map": {"a": null}}', r"is damaged \(weight_map.a is None, not text\)"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' stands there twice"),
        ("[" * 200_000, "more than 64 deep"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names a file '../x.safetensors', which is"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "names a file '/x.safetensors', which is"),
        ('{"weight_map": {"a": "config.json"}}', "names 'config.json', no safetensors file; down"),
    ],
)
def test_an_index_that_is_none_or_leaves_the_folder_is_refused(tmp_path, words, says):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(words)
    with pytest.raises(Unavailable, match=says):
        weight_files(tmp_path)


def with_header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        (1 << 63).to_bytes(8, "little") + b"{}",
        with_header("[" * 200_000),
        with_header("[]"),
        with_header('{"a": 1}'),
        with_header('{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0]}}'),
        with_header('{"a": {"dtype": 5, "shape": [0], "data_offsets": [0, 0]}}'),
        with_header(2 * '{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'),
        with_header(
            '{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},'
            ' "a": {"dtype": "I32", "shape": [0], "data_offsets": [0, 0]}}'
        ),
        with_header(
            '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 0]}}'
        ),
    ],
)
def test_a_header_of_another_shape_is_damage(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(Unavailable, match=r"^model.safetensors is damaged or truncated \(.+\); "):
        header(tmp_path / "model.safetensors")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(Unavailable, match="it is no regular file"):
        header(tmp_path / "model.safetensors")
