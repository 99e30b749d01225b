"""Stores of Hessians: what goes in comes out bitwise, and what is not whole is refused."""

import json
import shutil
from collections.abc import Mapping
from functools import partial, reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quip.data import hessian_files
from quip.data.hessians import HessianStore, StoreWriter
from quip.errors import Unavailable, UsageError
from quip.evaluate import memory
from quip.model.matrices import places
from tests.support.damage import body_of, flip, header_of, spread
from tests.support.hessians import FACTS, observed, written
from tests.support.tiny import tiny


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


def flip_last(path: Path) -> None:
    flip(path, -1)


@pytest.mark.parametrize("damage", [cut, flip_last, Path.unlink])
def test_a_damaged_file_is_refused_and_its_block_is_missing_on_resume(tmp_path, damage):
    blocks = observed()
    written(tmp_path, blocks)
    name = next(iter(blocks[1]))
    before = contents(tmp_path)
    damage(tmp_path / f"{name}.safetensors")
    with pytest.raises(Unavailable, match=rf"{name}.*--resume") as refusal:
        HessianStore(tmp_path).read(name)
    if "remove it, and" in str(refusal.value):  # its length is right
        (tmp_path / f"{name}.safetensors").unlink()
    writer = StoreWriter(tmp_path, FACTS, resume=True)
    assert [writer.has(index) for index in range(4)] == [True, False, True, True]
    assert not writer.complete
    writer.keep(1, blocks[1])
    writer.close()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", [cut, flip_last])
def test_what_is_damaged_in_a_store_that_was_broken_off_is_missing_on_resume(tmp_path, damage):
    blocks = observed()
    written(tmp_path, blocks[:2], close=False)
    damage(tmp_path / f"{next(iter(blocks[0]))}.safetensors")
    writer = StoreWriter(tmp_path, FACTS, resume=True)
    assert [writer.has(index) for index in range(3)] == [False, True, False]


@pytest.mark.parametrize("i", range(12))
def test_no_bit_of_a_store_flips_unseen(opt_store, tmp_path, i):
    store = HessianStore(Path(shutil.copytree(opt_store.folder, tmp_path / "store")))
    name = store.inputs[i % len(store.inputs)].name
    path = hessian_files.file_of(store.folder, name)
    flip(path, spread(path, 12)[i], bit=i % 8)
    with pytest.raises(Unavailable, match=rf"{name}.safetensors is damaged .*; remove it, and re"):
        store.read(name)


@pytest.mark.parametrize(
    ("was", "becomes"), [("F32", "I32"), ("F64", "I64"), ('"shape":[32]', '"shape":[1,32]')]
)
def test_types_and_axes_of_a_store_are_those_that_are_written(opt_store, tmp_path, was, becomes):
    store = HessianStore(Path(shutil.copytree(opt_store.folder, tmp_path / "store")))
    name = store.inputs[0].name
    path = hessian_files.file_of(store.folder, name)
    header, body = header_of(path), body_of(path)
    text = json.dumps(header, separators=(",", ":")).replace(was, becomes).encode()
    assert text != json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(Unavailable, match=rf"{name}.safetensors is damaged .*; remove it, and re"):
        store.read(name)


def test_a_complete_store_is_taken_up_without_reading_its_files(tmp_path, monkeypatch):
    written(tmp_path, observed())
    before = contents(tmp_path)
    monkeypatch.delattr(hessian_files, "read_tensors")
    assert StoreWriter(tmp_path, {**FACTS, "versions": {}}, resume=True).complete
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda words: [words.pop(key) for key in FACTS], "model is missing"),
        (lambda words: words.pop("complete"), "complete is missing"),
        (lambda words: words.pop("inputs"), "inputs is missing"),
        (lambda words: words["calibration"].clear(), "calibration.dataset is missing"),
        (lambda words: words["inputs"][1].pop("name"), "inputs.1..name is missing"),
        (
            lambda words: words["inputs"][1].update(size="7"),
            r"inputs\[1\].size is '7', not a whole number",
        ),
        (lambda words: words["inputs"].append(None), "is None, not a mapping"),
    ],
)
def test_a_manifest_that_lacks_something_is_refused_and_nothing_is_lost(tmp_path, change, reason):
    written(tmp_path, observed())
    words = json.loads((tmp_path / "manifest.json").read_text())
    change(words)
    (tmp_path / "manifest.json").write_text(json.dumps(words))
    before = contents(tmp_path)
    for use in (HessianStore, partial(StoreWriter, facts=FACTS, resume=True)):
        with pytest.raises(Unavailable, match=rf"is damaged \(.*{reason}.*--overwrite"):
            use(tmp_path)
    assert contents(tmp_path) == before
    assert not StoreWriter(tmp_path, FACTS).complete


@pytest.mark.parametrize("n", [1, 2, 5, 12, 13])
def test_a_triangle_is_mirrored_bitwise_whatever_the_panels(monkeypatch, rng, n):
    monkeypatch.setattr(hessian_files, "PANEL", 4)
    A = torch.randn(n, n, generator=rng).tril()
    H = hessian_files.symmetric(n, A[torch.ones(n, n, dtype=torch.bool).tril()])
    assert torch.equal(H.view(torch.int64), (A + A.tril(-1).T).double().view(torch.int64))


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="the system's mark cannot be reset")
def test_a_matrix_is_mirrored_where_it_is():
    n, lower = 4096, torch.ones(4096 * 4097 // 2)
    with memory.measured("cpu") as found:
        H = hessian_files.symmetric(n, lower)
    assert found.peak_bytes - found.start_bytes < 1.5 * H.nbytes


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
    opt_store.check(places(tiny("opt")))


def test_a_store_of_another_model_is_refused_by_the_name_of_a_matrix(opt_store):
    with pytest.raises(UsageError, match=r"model.layers.0.*nothing of it; it is of 'tiny'"):
        opt_store.check(places(tiny("llama")))


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
    with pytest.raises(
        UsageError, match=rf"{name} has 48 inputs, block 0, and the store holds 7 inputs"
    ):
        copied(opt_store, tmp_path, words).check(places(tiny("opt")))
    with pytest.raises(Unavailable, match=r"damaged \(lower is F32 \[1176\], not F32 \[28\]\)"):
        HessianStore(tmp_path).read(name)
    words = manifest_of(opt_store)
    words["inputs"][3]["matrices"].append("model.more")
    with pytest.raises(UsageError, match=r"has no 'model\.more'"):
        copied(opt_store, tmp_path, words).check(places(tiny("opt")))


def test_reading_a_name_that_is_not_there_says_so(opt_store):
    with pytest.raises(UsageError, match=r"no Hessian of lm_head"):
        opt_store.read("lm_head")


def test_only_files_that_a_store_writes_are_removed_and_none_outside_of_it(tmp_path):
    folder, victim = tmp_path / "store", tmp_path / "victim" / "model.safetensors"
    written(folder, observed())
    victim.parent.mkdir()
    for place in (victim, folder / "model.safetensors"):
        save_file({"weight": torch.ones(3)}, place)
    words = json.loads((folder / "manifest.json").read_text())
    for name in ("../victim/model", str(victim.with_suffix("")), "model"):
        words["inputs"][0].update(name=name, matrices=[name])
        (folder / "manifest.json").write_text(json.dumps(words))
        if name != "model":
            with pytest.raises(Unavailable, match=r"is damaged \(.*, which is no plain name of"):
                HessianStore(folder)
        StoreWriter(folder, FACTS)
        assert victim.exists()
        assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("format",), True, "is of format True"),
        (("digest",), [], r"digest is \[\], not a mapping"),
        (("calibration",), None, "calibration is None, not a mapping"),
        (("complete",), 1, "complete is 1, not true or false"),
        (("inputs",), {}, "inputs is {}, not a list"),
        (("inputs", 1), 5, r"inputs\[1\] is 5, not a mapping"),
        (("inputs", 1, "block"), True, r"inputs\[1\].block is True, not a whole number"),
        (("inputs", 1, "block"), -1, r"inputs\[1\].block is -1, not from 0 to inf"),
        (("inputs", 1, "matrices"), [["q"]], r"inputs\[1\].matrices\[0\] is \['q'\], not text"),
        (("inputs", 1, "matrices"), [], r"inputs\[1\].matrices is \[\], not from 1 to inf"),
        (("inputs", 1, "name"), "v", "the input 'v' is not called by its first matrix"),
        (
            ("inputs", 1, "size"),
            10**24,
            "has 32 inputs, block 0, and the store holds 10{24} inputs",
        ),
    ],
)
def test_a_manifest_of_another_shape_is_damage(opt_store, tmp_path, place, value, says):
    words = manifest_of(opt_store)
    *above, last = place
    reduce(getitem, above, words)[last] = value
    with pytest.raises((Unavailable, UsageError), match=says):
        copied(opt_store, tmp_path, words).check(places(tiny("opt")))


def test_an_input_that_stands_there_twice_is_refused_by_name(opt_store, tmp_path):
    words = manifest_of(opt_store)
    name = words["inputs"][0]["name"]
    words["inputs"].append(words["inputs"][0])
    with pytest.raises(Unavailable, match=rf"the matrix '{name}' stands there twice: of '{name}'"):
        copied(opt_store, tmp_path, words)


def test_a_matrix_of_two_inputs_is_refused_by_name(opt_store, tmp_path):
    words = manifest_of(opt_store)
    first, second = words["inputs"][:2]
    second["matrices"].append(first["matrices"][-1])
    twice, of = first["matrices"][-1], (first["name"], second["name"])
    says = rf"the matrix '{twice}' stands there twice: of '{of[0]}' and of '{of[1]}'"
    with pytest.raises(Unavailable, match=says):
        copied(opt_store, tmp_path, words)


@pytest.mark.parametrize("block", [99, 1])
def test_an_input_of_another_block_is_refused_by_name(opt_store, tmp_path, block):
    words = manifest_of(opt_store)
    row = words["inputs"][0]
    row["block"] = block
    says = rf"{row['name']} has 32 inputs, block 0, and the store holds 32 inputs, block {block};"
    with pytest.raises(UsageError, match=says):
        copied(opt_store, tmp_path, words).check(places(tiny("opt")))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lower": None}, r"lower is missing, not F32 \[528\]"),
        ({"mean": None}, r"mean is missing, not F64 \[32\]"),
        ({"count": None}, r"count is missing, not I64 \[\]"),
        ({"lower": torch.ones(528).double()}, r"lower is F64 \[528\]"),
        ({"lower": torch.ones(3)}, r"lower is F32 \[3\], not F32 \[528\]"),
        ({"mean": torch.ones(1, 32).double()}, r"mean is F64 \[1, 32\]"),
        ({"count": torch.ones(2).long()}, r"count is I64 \[2\]"),
    ],
)
def test_moments_of_another_shape_are_damage_whatever_their_digest(
    opt_store, tmp_path, change, says
):
    words = manifest_of(opt_store)
    copied(opt_store, tmp_path, words)
    row = words["inputs"][0]
    path = tmp_path / f"{row['name']}.safetensors"
    tensors = {k: x for k, x in {**load_file(path), **change}.items() if x is not None}
    save_file(tensors, path)
    row["digest"] = hessian_files.moments_digest(tensors)
    (tmp_path / "manifest.json").write_text(json.dumps(words))
    store = HessianStore(tmp_path)
    for use in (lambda: store.check(places(tiny("opt"))), lambda: store.read(row["name"])):
        with pytest.raises(Unavailable, match=rf"{row['name']}.* is damaged \({says}.*--resume"):
            use()
