"""Finished blocks of another shape than any that was written: one line each, with the remedy."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quip.errors import QuipError
from quip.matrix.build import build_recipe
from quip.model.fingerprints import differences
from quip.model.ledger import Ledger
from quip.model.quantize import quantize_matrix_by_matrix
from quip.model.run import Run
from quip.packed.files import tensors_of
from tests.support.tiny import tiny, tokens

RECIPE = build_recipe(quant="nearest", wbits=4)
NAME = "model.layers.1"


def quantized(folder: Path) -> list:
    ledger = Ledger(folder, {"seed": 0})
    ledger.open()
    run = Run(recipe=RECIPE, device="cpu", seed=0, ledger=ledger)
    return list(quantize_matrix_by_matrix(tiny("llama"), tokens(), run))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    quantized(folder)
    return folder


@pytest.fixture
def blocks(finished: Path, tmp_path: Path) -> Path:
    """A ledger that is to be taken up at block 2."""
    folder = Path(shutil.copytree(finished, tmp_path / "blocks"))
    for index in (2, 3):
        (folder / f"block-000{index}.safetensors").unlink()
    hidden = {"hidden": torch.zeros(*tokens().shape, 32)}
    save_file(hidden, folder / "hidden.safetensors", metadata={"block": "2"})
    return folder


def rewrite(path: Path, change: Callable[[dict, dict], object]) -> None:
    """The file with other tensors and words, without the seal that it had."""
    with safe_open(path, "pt") as file:
        words = dict(file.metadata())
        tensors = tensors_of(file)
    words = {
        key: words[key] for key in ("name", "layout", "records", "tuned", "block") & words.keys()
    }
    change(tensors, words)
    save_file(tensors, path, metadata=words or None)


def said(key: str, text: object) -> Callable[[dict, dict], object]:
    return lambda tensors, words: words.update(
        {key: text if isinstance(text, str) else json.dumps(text)}
    )


def record(**changes: object) -> Callable[[dict, dict], object]:
    def change(tensors: dict, words: dict) -> None:
        records = json.loads(words["records"])
        records[0] = {k: x for k, x in {**records[0], **changes}.items() if x is not None}
        words["records"] = json.dumps(records)

    return change


def test_a_ledger_that_is_whole_is_taken_up(blocks: Path):
    assert len(quantized(blocks)) == 28


def test_a_ledger_of_an_older_version_with_shorter_names_is_taken_up(blocks: Path, tmp_path):
    def shorten(tensors: dict, words: dict) -> None:
        short = {key.removeprefix(f"{words['name']}."): x for key, x in tensors.items()}
        tensors.clear()
        tensors |= {key: x.float() if x.is_floating_point() else x for key, x in short.items()}

    expected = quantized(Path(shutil.copytree(blocks, tmp_path / "as-now")))
    rewrite(blocks / "block-0001.safetensors", shorten)
    again = quantized(blocks)
    assert [(x.name, x.proxy_loss) for x in again] == [(x.name, x.proxy_loss) for x in expected]


def test_a_ledger_whose_records_say_more_is_taken_up(blocks: Path):
    rewrite(blocks / "block-0001.safetensors", record(later="words"))
    assert len(quantized(blocks)) == 28


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, w: w.pop("name"), "name is missing"),
        (lambda t, w: w.pop("layout"), "layout is missing"),
        (said("name", "model.layers.0"), "it is of 'model.layers.0', not of model.layers.1"),
        (said("name", "lm_head"), "it is of 'lm_head', not of model.layers.1"),
        (said("layout", "{"), "Expecting property name"),
        (said("layout", []), "it is [], not a mapping"),
        (said("layout", "[" * 200_000), "more than 64 deep"),
        (said("layout", {}), "codebook is missing"),
        (said("records", {}), "it is {}, not a list"),
        (said("records", [5]), "[0] is 5, not a mapping"),
        (said("records", '[{"name": "a", "name": "b"}]'), "the key 'name' stands there twice"),
        (record(block=True), "[0].block is True, not a whole number"),
        (record(rows=None), "[0].rows is missing"),
        (record(proxy_loss="0"), "[0].proxy_loss is '0', not a number"),
        (said("tuned", [{"block": 1, "after": "q"}]), "[0].after is 'q', not a list"),
        (lambda t, w: t.pop("model.layers.1.mlp.down_proj.codes"), "Missing key(s)"),
        (lambda t, w: t.update(more=torch.ones(1)), "Unexpected key(s)"),
        (
            lambda t, w: t.update({"model.layers.1.mlp.down_proj.codes": torch.ones(1)}),
            "size mismatch",
        ),
    ],
)
def test_a_block_of_another_shape_is_damage(blocks: Path, change: Callable, says: str):
    path = blocks / "block-0001.safetensors"
    rewrite(path, change)
    with pytest.raises(QuipError) as error:
        quantized(blocks)
    assert str(error.value).startswith(f"{path} is damaged (")
    assert str(error.value).endswith("; start over with --overwrite")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, w: w.update(name=w.pop("block")), "(block is missing); start over with --ov"),
        (said("block", "x"), "(Expecting value: line 1 column 1 (char 0)); start over"),
        (said("block", "-1"), "(it is -1, not from 0 to inf); start over with --overwrite"),
        (said("block", "9" * 5000), "(a number of 5000 digits); start over with --overwrite"),
        (lambda t, w: t.update(other=t.pop("hidden")), "(hidden is missing); start over with"),
        (lambda t, w: t.update(hidden=torch.zeros(7, 12, 3)), "are [7, 12, 3] torch.float32, and"),
        (lambda t, w: t.update(hidden=t["hidden"].half()), "torch.float16, and the model has"),
    ],
)
def test_hidden_states_of_another_shape_are_damage(blocks: Path, change: Callable, says: str):
    rewrite(blocks / "hidden.safetensors", change)
    with pytest.raises(QuipError, match=re.escape(says)):
        quantized(blocks)


@pytest.mark.parametrize(
    "text", ["[]", "5", "null", "{", '{"a": 1, "a": 2}', "[" * 200_000, "9" * 5000]
)
def test_a_fingerprint_that_is_none_is_damage(blocks: Path, text: str):
    (blocks / "fingerprint.json").write_text(text)
    with pytest.raises(QuipError, match=r"fingerprint.json is damaged \(.*\); start over with --o"):
        quantized(blocks)


def test_fingerprints_that_differ_in_all_are_told_in_a_few_words():
    before: Mapping = {f"{'k' * 1000}{i}": 0 for i in range(1000)}
    assert len(differences(before, {})) < 2600
    assert differences(before, {}).endswith("was 0, is now None; 990 more")
