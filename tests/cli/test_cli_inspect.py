"""`quip inspect`: a table, JSON or a plot, and one line for what is no checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from quip.cli.inspect import inspection_table
from quip.jobs.inspect import inspect_checkpoint
from quip.packed.digests import DIGESTS
from quip.packed.files import header
from tests.support.checkpoints import save_quantized
from tests.support.damage import flip, tensor_at, unsigned
from tests.support.runs import save_model, write_text

pytestmark = pytest.mark.usefixtures("command")


def test_the_table_is_short_and_stands_in_columns(quip, packed):
    status, out, err = quip("inspect", packed)
    assert (status, err) == (0, [])
    lines = out.splitlines()
    assert lines[:3] == [
        str(packed),
        "OPTForCausalLM (opt): 4 blocks, hidden size 32, vocabulary 64",
        "made from demo: ldlq, 2 bits",
    ]
    assert "quantized        24 matrices, 28,672 of 33,216 weights" in lines
    assert len(lines) < 50
    for head in ("stored as", "perplexity", "worst matrices"):
        start = next(i for i, line in enumerate(lines) if line.startswith(head))
        end = next(i for i in range(start, len(lines) + 1) if not "".join(lines[i : i + 1]))
        assert end - start > 2
        assert len({len(line) for line in lines[start:end]}) == 1
    row = next(line for line in lines if line.startswith("pydoc"))
    assert row.split() == ["pydoc", "20", "25", "3", "16", "ab"]
    row = next(line for line in lines if line.startswith("c4"))
    assert row.split() == ["c4", "-", "inf", "-", "-", "-"]


def test_the_table_names_the_plot_beside_it_and_what_is_damaged(packed, tmp_path):
    found = inspect_checkpoint(packed)
    assert "layers.png" not in inspection_table(found)
    shown = inspection_table({**found, "plot": "layers.png", "notes": ["run.json is damaged"]})
    assert shown.splitlines()[-3:] == [
        f"proxy losses along depth: {packed / 'layers.png'}",
        "",
        "note: run.json is damaged",
    ]


def test_json_is_everything_that_is_known(quip, packed):
    status, out, err = quip("inspect", packed, "--json")
    assert (status, err) == (0, [])
    assert json.loads(out) == inspect_checkpoint(packed)


def test_tensors_are_verified_when_asked_and_the_damaged_are_named(quip, packed, tmp_path):
    status, out, err = quip("inspect", packed, "--verify", "--json")
    assert (status, err) == (0, [])
    tensors = len(header(packed / "model.safetensors"))
    whole = {"tensors": tensors, "damaged": 0, "damaged_tensors": [], "unsigned": []}
    assert json.loads(out) == {**inspect_checkpoint(packed), "verification": whole}

    folder = Path(shutil.copytree(packed, tmp_path / "damaged"))
    path = folder / "model.safetensors"
    names = [name for name in header(path) if name.endswith(("fc1.codes", "fc2.rescale"))]
    for name in names:
        flip(path, tensor_at(path, name))
    status, out, err = quip("inspect", folder, "--verify")
    assert (status, err) == (
        1,
        [f"quip: {folder}: 8 of its tensors are not what was saved; download or save it again"],
    )
    assert f"{tensors - 8} of {tensors} tensors with digests are what was saved" in out
    assert [line[10:-1] for line in out.splitlines() if line[:8] == "damaged:"] == sorted(names)
    status, out, _ = quip("inspect", folder, "--verify", "--json")
    assert (status, json.loads(out)["verification"]["damaged_tensors"]) == (1, sorted(names))
    assert quip("inspect", folder)[0] == 0

    unsigned(path, DIGESTS)
    status, out, err = quip("inspect", folder, "--verify")
    assert (status, err) == (0, [])
    assert "0 of 0 tensors with digests are what was saved\nno digests: model.safetensors" in out


def test_of_many_damaged_tensors_the_first_are_named(packed):
    found = inspect_checkpoint(packed, verify_tensors=True)
    found["verification"].update(damaged=102, damaged_tensors=[f"t{i}" for i in range(100)])
    assert "damaged: 't99'\nand 2 more" in inspection_table(found)


def test_the_plot_is_a_picture_of_the_records_in_run_json(quip, packed, tmp_path):
    status, out, err = quip("inspect", packed, "--plot", tmp_path / "a.png")
    assert (status, err) == (0, [])
    assert out.startswith(str(packed))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_is_one_line_and_no_table(quip, packed, tmp_path, monkeypatch):
    save_quantized(tmp_path / "bare", run=None)
    status, out, [line] = quip("inspect", packed, "--plot", tmp_path / "no" / "a.png")
    assert (status, out) == (1, "")
    assert "a.png cannot be written (No such file or directory)" in line

    status, out, [line] = quip("inspect", tmp_path / "bare", "--plot", tmp_path / "a.png")
    assert (status, out) == (1, "")
    assert "no run.json there knows the matrices" in line
    assert not (tmp_path / "a.png").exists()

    monkeypatch.setattr("quip.jobs.report.plots.find_spec", lambda package: None)
    status, out, [line] = quip("inspect", packed, "--plot", tmp_path / "a.png")
    assert (status, out) == (1, "")
    assert "pip install -e '.[plot]' (in a checkout of quip)" in line


def test_what_is_no_checkpoint_is_one_line_and_status_1(quip, tmp_path):
    status, out, [line] = quip("inspect", tmp_path / "nowhere")
    assert (status, out) == (1, "")
    assert line.startswith(f"quip: {tmp_path / 'nowhere'}: not a checkpoint")
    status, out, [line] = quip("inspect", save_model(tmp_path / "dense"))
    assert (status, out) == (1, "")
    assert "the model is not quantized; name a folder written by --save" in line
    status, out, [line] = quip("inspect")
    assert (status, out) == (2, "")
    assert "the following arguments are required: DIR" in line


def test_what_a_run_saves_is_known_whole(quip, tmp_path):
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "text.txt")
    words = f"--wbits 2 --incoh_processing --nsamples 4 --seqlen 16 --eval_datasets {text}"
    status, _, _ = quip(
        "run", model, text, *words.split(), "--eval_nsamples", 2, "--save", tmp_path / "saved"
    )
    assert status == 0
    _, out, _ = quip("inspect", tmp_path / "saved", "--json")
    found = json.loads(out)
    assert found["notes"] == []
    assert found["base_model"] == model
    [row] = found["perplexities"]
    assert (row["dataset"], row["windows"], row["seqlen"]) == (text, 2, 16)
    assert row["quantized"] > 1
    assert len(found["worst_matrices"]) == 10
    assert found["plot"] == "layers.png"
    _, out, _ = quip("inspect", tmp_path / "saved")
    assert f"proxy losses along depth: {tmp_path / 'saved' / 'layers.png'}" in out
