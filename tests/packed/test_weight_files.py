"""The safetensors files of a folder: their names, their headers, and what damage is called."""

import json

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
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(Unavailable, match=r"^model.safetensors.index.json cannot be read"):
        weight_files(tmp_path)
