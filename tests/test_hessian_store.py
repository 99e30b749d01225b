"""Stores of Hessians: what goes in comes out bitwise, and what is not whole is refused."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from quip.errors import Unavailable, UsageError
from quip.hessian import Hessian
from quip.hessian_store import HessianStore, StoreWriter
from quip.walk import walk
from tests.tiny import tiny, tokens

FACTS = {"model": "tiny", "source": "original", "calibration": {"dataset": "random"}}


def observed(name: str = "opt") -> list[dict[str, Hessian]]:
    """The Hessians of each block of a tiny model."""
    return [block.observe() for block in walk(tiny(name), tokens(), device="cpu")]


def written(
    folder: Path, blocks: list[dict[str, Hessian]], *, close: bool = True, **options: bool
) -> StoreWriter:
    writer = StoreWriter(folder, FACTS, **options)
    for index, hessians in enumerate(blocks):
        writer.keep(index, hessians)
    if close:
        writer.close()
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_store_gives_back_bitwise_what_a_run_would_use(tmp_path, name):
    blocks = observed(name)
    written(tmp_path, blocks)
    store = HessianStore(tmp_path)
    for hessians in blocks:
        for matrix, hessian in hessians.items():
            found = store.read(matrix)
            assert found.H.dtype == torch.float64
            assert torch.equal(found.H, hessian.value())
            assert torch.equal(found.mean, hessian.mean())
            assert found.count == hessian.count
    assert store.manifest["model"] == "tiny"
    assert store.manifest["calibration"] == {"dataset": "random"}


def test_an_input_that_several_matrices_share_is_stored_once(tmp_path):
    writer = written(tmp_path, observed("llama"))
    store = HessianStore(tmp_path)
    shared = [one.matrices for one in store.inputs[:4]]
    prefix = "model.layers.0."
    assert shared == [
        tuple(f"{prefix}self_attn.{x}_proj" for x in "qkv"),
        (f"{prefix}self_attn.o_proj",),
        (f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"),
        (f"{prefix}mlp.down_proj",),
    ]
    assert [one.block for one in store.inputs] == [i for i in range(4) for _ in range(4)]
    assert all(one.name == one.matrices[0] for one in store.inputs)
    files = {f"{one.name}.safetensors" for one in store.inputs}
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", *files}
    assert {path.name for path in writer.files} == files


def test_the_file_holds_the_lower_triangle_row_by_row(tmp_path):
    from safetensors.torch import load_file

    blocks = observed()
    written(tmp_path, blocks)
    name, hessian = next(iter(blocks[0].items()))
    H, lower = hessian.value(), load_file(tmp_path / f"{name}.safetensors")["lower"]
    assert lower.dtype == torch.float32
    rows = [H[i, : i + 1] for i in range(len(H))]
    assert torch.equal(lower.double(), torch.cat(rows))


def test_a_store_is_the_same_bitwise_however_often_it_was_broken_off(tmp_path):
    blocks = observed()
    written(tmp_path / "whole", blocks)
    written(tmp_path / "parts", blocks[:2], close=False)
    writer = StoreWriter(tmp_path / "parts", FACTS, resume=True)
    assert [writer.has(index) for index in range(4)] == [True, True, False, False]
    for index in (2, 3):
        writer.keep(index, blocks[index])
    writer.close()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert HessianStore(tmp_path / "parts").digest == HessianStore(tmp_path / "whole").digest


def test_an_incomplete_store_is_refused_with_the_remedy(tmp_path):
    written(tmp_path, observed()[:2], close=False)
    with pytest.raises(Unavailable, match=r"not complete.*--resume"):
        HessianStore(tmp_path)


def test_what_is_no_store_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(Unavailable, match=r"no store of Hessians.*quip hessians MODEL DATASET"):
        HessianStore(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(Unavailable, match=r"damaged.*--overwrite"):
        HessianStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(Unavailable, match="format 99"):
        HessianStore(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_file_is_refused_and_its_block_is_missing_on_resume(tmp_path, damage):
    blocks = observed()
    written(tmp_path, blocks)
    name = next(iter(blocks[1]))
    before = contents(tmp_path)
    damage(tmp_path / f"{name}.safetensors")
    with pytest.raises(Unavailable, match=rf"{name}.*--resume"):
        HessianStore(tmp_path).read(name)
    writer = StoreWriter(tmp_path, FACTS, resume=True)
    assert [writer.has(index) for index in range(4)] == [True, False, True, True]
    assert not writer.complete
    writer.keep(1, blocks[1])
    writer.close()
    assert contents(tmp_path) == before


def test_starting_over_removes_what_the_store_before_held_and_nothing_else(tmp_path):
    written(tmp_path, observed())
    (tmp_path / "model.safetensors").write_text("of somebody else")
    StoreWriter(tmp_path, FACTS)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "model.safetensors"}


@pytest.fixture(scope="module")
def opt_store(tmp_path_factory) -> HessianStore:
    folder = tmp_path_factory.mktemp("opt")
    written(folder, observed())
    return HessianStore(folder)


def test_a_store_fits_the_model_that_it_was_made_of(opt_store):
    opt_store.check(tiny("opt"))


def test_a_store_of_another_model_is_refused_by_the_name_of_a_matrix(opt_store):
    with pytest.raises(UsageError, match=r"model.layers.0.*nothing of it; it is of tiny"):
        opt_store.check(tiny("llama"))


def manifest_of(store: HessianStore) -> dict:
    return json.loads((store.folder / "manifest.json").read_text())


def copied(store: HessianStore, folder: Path, words: Mapping) -> HessianStore:
    for path in store.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "manifest.json").write_text(json.dumps(words))
    return HessianStore(folder)


def test_sizes_that_differ_and_matrices_too_many_are_refused(opt_store, tmp_path):
    words = manifest_of(opt_store)
    words["inputs"][3]["size"] = 7
    name = words["inputs"][3]["name"]
    with pytest.raises(UsageError, match=rf"{name} has 48 inputs, and the store holds 7 inputs"):
        copied(opt_store, tmp_path, words).check(tiny("opt"))
    words = manifest_of(opt_store)
    words["inputs"][3]["matrices"].append("model.more")
    with pytest.raises(UsageError, match=r"has no model\.more"):
        copied(opt_store, tmp_path, words).check(tiny("opt"))


def test_reading_a_name_that_is_not_there_says_so(opt_store):
    with pytest.raises(UsageError, match=r"no Hessian of lm_head"):
        opt_store.read("lm_head")
