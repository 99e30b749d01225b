"""What is said of a checkpoint without reading it: the same as reading it would say."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from quip.errors import QuipError, Unavailable, UnsupportedModel
from quip.evaluate.memory import module_bytes
from quip.jobs.inspect import inspect_checkpoint, matrix_records
from quip.jobs.report.report import summary
from quip.matrix.build import build_recipe
from quip.model.load import load_model
from quip.packed import shards
from quip.packed.checkpoint import load
from tests.support.checkpoints import QUIP, RUN, save_quantized

GROUPED = build_recipe(quant="gptq", wbits=3, groupsize=16)


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file; those of quantization_config by quantization__name."""
    words = json.loads(path.read_text())
    for name, value in changes.items():
        if name.startswith("quantization__"):
            words["quantization_config"][name.removeprefix("quantization__")] = value
        else:
            words[name] = value
    path.write_text(json.dumps(words))


@pytest.mark.parametrize(
    ("name", "recipe"), [("opt", QUIP), ("opt", GROUPED), ("llama", QUIP), ("llama", GROUPED)]
)
def test_sizes_are_those_of_the_files_and_of_the_model_that_is_loaded(tmp_path, name, recipe):
    folder = tmp_path / "a"
    records = save_quantized(folder, name, recipe)
    found = inspect_checkpoint(folder)
    totals = summary(records)
    assert found["quantized_matrices"] == totals["matrices"]
    assert found["quantized_weights"] == totals["weights"]
    assert found["bits_per_weight"] == pytest.approx(totals["bits_per_weight"], rel=1e-12)

    size = (folder / "model.safetensors").stat().st_size
    kinds = found["bytes_by_kind"]
    assert found["file_bytes"] == size == found["header_bytes"] + sum(kinds.values())
    biased, zeros = name == "opt", recipe is GROUPED  # of llama no matrix has a bias
    assert (kinds["bias"] > 0, "zero" in kinds, "factors" in kinds) == (biased, zeros, not zeros)
    assert kinds["codes"] == sum(
        4 * r.rows * math.ceil(recipe.codebook.bits * r.columns / 32) for r in records
    )

    packed_model: nn.Module = load(folder)
    assert found["memory_bytes"] == module_bytes(packed_model)
    original = load_model(str(tmp_path / "a-original")).model
    weights = sum(parameter.numel() for parameter in original.parameters())  # tied ones once
    assert (found["weights"], found["dense_bytes"]) == (weights, 2 * weights)
    assert found["bits_per_weight_of_all"] == 8 * sum(kinds.values()) / weights


def test_what_the_checkpoint_is_and_where_it_came_from(packed):
    found = inspect_checkpoint(packed)
    assert found["architecture"] == {
        "class": "OPTForCausalLM",
        "model_type": "opt",
        "blocks": 4,
        "hidden_size": 32,
        "vocab_size": 64,
    }
    assert (found["base_model"], found["method"]) == ("demo", "ldlq, 2 bits")
    assert (found["recipe"], found["format"]) == ({"order": "backwards"}, 1)
    assert found["codebook"] == {"kind": "grid", "bits": 2, "group": 1, "symmetric": True}
    assert [part["kind"] for part in found["transforms"]] == ["rescale", "kronecker"]
    assert (found["dtype"], found["files"], found["plot"]) == ("float32", 1, None)
    assert found["perplexities"] == [
        {**RUN["evaluation"]["pydoc"], "original": 20.0, "quantized": 25.0},
        {"dataset": "c4", "original": None, "quantized": "inf"},
    ]
    assert found["notes"] == []


def test_headers_suffice(copy):
    before = inspect_checkpoint(copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[: before["header_bytes"]].ljust(before["file_bytes"], b"\0"))
    assert inspect_checkpoint(copy) == before
    with pytest.raises(QuipError, match=r"model.safetensors is damaged: .* are not what was saved"):
        load(copy)


def test_a_checkpoint_in_several_files_is_the_same_checkpoint(tmp_path, packed, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", "20KB")
    save_quantized(tmp_path / "a")
    one, many = inspect_checkpoint(packed), inspect_checkpoint(tmp_path / "a")
    assert many["files"] == 2
    for key in ("bits_per_weight", "bytes_by_kind", "memory_bytes", "weights"):
        assert many[key] == one[key]
    assert many["file_bytes"] - many["header_bytes"] == one["file_bytes"] - one["header_bytes"]

    (tmp_path / "a" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Unavailable, match=r"there is no model-00002-of-00002\.safetensors; "):
        inspect_checkpoint(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(Unavailable, match=r"index\.json is damaged"):
        inspect_checkpoint(tmp_path / "a")


def test_the_worst_matrices_come_first_and_nan_is_the_worst(copy):
    run = json.loads((copy / "run.json").read_text())
    for matrix, loss in zip(run["matrices"], ["inf", 0.5, "nan", 0.7], strict=False):
        matrix["proxy_loss"] = loss
    (copy / "run.json").write_text(json.dumps(run))
    found = inspect_checkpoint(copy)
    worst = found["worst_matrices"]
    assert [row["proxy_loss"] for row in worst[:4]] == ["nan", "inf", 0.7, 0.5]
    assert len(worst) == 10
    rest = [row["proxy_loss"] for row in worst[4:]]
    assert rest == sorted(rest, reverse=True)
    for key in ("name", "rows", "columns", "bits_per_weight"):
        assert worst[0][key] == run["matrices"][2][key]
    json.dumps(found, allow_nan=False)


def test_records_come_back_as_they_were_written(tmp_path):
    records = save_quantized(tmp_path / "a")
    assert matrix_records(tmp_path / "a") == records


def test_a_checkpoint_without_a_report_is_known_by_its_files(copy):
    before = inspect_checkpoint(copy)
    (copy / "run.json").unlink()
    found = inspect_checkpoint(copy)
    lost = {"base_model": None, "method": None, "recipe": None}
    assert found == {**before, **lost, "perplexities": [], "worst_matrices": []}
    with pytest.raises(Unavailable, match=r"no run\.json there knows the matrices"):
        matrix_records(copy)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", '"a"', '{"perplexity": 3}', '{"perplexity": {"a": "b"}}'),
        *('{"perplexity": {"a": 1}, "evaluation": {"a": 3}}', '{"matrices": 3}'),
        *('{"matrices": [{"name": "a"}]}', '{"matrices": [null]}', '{"matrices": ["a"]}'),
    ],
)
def test_a_damaged_report_costs_what_only_it_knows_and_a_note_says_so(copy, text):
    before = inspect_checkpoint(copy)
    (copy / "run.json").write_text(text)
    found = inspect_checkpoint(copy)
    [note] = found["notes"]
    assert "run.json is damaged (" in note
    assert "\n" not in note
    assert (found["perplexities"], found["worst_matrices"]) == ([], [])
    assert found["bytes_by_kind"] == before["bytes_by_kind"]
    with pytest.raises(Unavailable, match=r"run.json is damaged \("):
        matrix_records(copy)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD = {
    "nothing": (lambda f: shutil.rmtree(f), Unavailable, "no config.json that can be read"),
    "no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        Unavailable,
        r"its config.json is damaged \(Expecting",
    ),
    "dense": (
        lambda f: edit(f / "config.json", quantization_config=None),
        UnsupportedModel,
        "the model is not quantized; name a folder written by --save",
    ),
    "of another tool": (
        lambda f: edit(f / "config.json", quantization__quant_method="gptq"),
        UnsupportedModel,
        "was quantized by 'gptq'",
    ),
    "newer": (
        lambda f: edit(f / "config.json", quantization__format=99),
        QuipError,
        "format 99.*upgrade quip",
    ),
    "unknown model": (
        lambda f: edit(f / "config.json", model_type="zork"),
        Unavailable,
        "its config.json makes no model",
    ),
    "no such matrix": (
        lambda f: edit(f / "config.json", quantization__modules=["model.zork"]),
        Unavailable,
        "model.zork is a quantized matrix.*there is no such module",
    ),
    "no matrix": (
        lambda f: edit(f / "config.json", quantization__modules=[]),
        Unavailable,
        "names no quantized matrix",
    ),
    "other sizes": (
        lambda f: edit(f / "config.json", ffn_dim=96),
        Unavailable,
        r"config.json asks for .* and the files hold",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        Unavailable,
        "there is no model.safetensors",
    ),
    "truncated": (truncate, Unavailable, "model.safetensors is damaged or truncated"),
    "empty": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        Unavailable,
        "model.safetensors is damaged or truncated",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_is_no_whole_checkpoint_is_refused_in_one_line(copy, case):
    damage, kind, reason = BAD[case]
    damage(copy)
    with pytest.raises(kind, match=reason) as caught:
        inspect_checkpoint(copy)
    assert str(caught.value).startswith(f"{copy}: ")
    assert "\n" not in str(caught.value)


def test_a_dtype_to_compute_in_counts_for_what_is_not_packed(copy):
    wide = inspect_checkpoint(copy)
    edit(copy / "config.json", dtype="bfloat16")
    narrow = inspect_checkpoint(copy)
    assert narrow["dtype"] == "bfloat16"
    body: nn.Module = load(copy)
    assert narrow["memory_bytes"] == module_bytes(body) < wide["memory_bytes"]
    assert next(body.parameters()).dtype == torch.bfloat16
