"""`quip summary`: tables, files, pictures and the published command line, on a tiny model."""

import csv
import json
import runpy
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quip.data.hessians import HessianStore, StoreWriter
from quip.jobs.fingerprint import identity_of
from quip.jobs.report.folder import RunFolder
from quip.matrix.build import build_recipe
from quip.matrix.seeds import rng_for
from quip.model.load import load_model
from quip.model.walk import walk
from quip.research.hessians.spectrum import weight_numbers
from quip.research.hessians.stages import Stage, processed
from quip.research.hessians.summary import SummaryRequest, summarize
from quip.transforms import Chain
from tests.support.runs import save_model
from tests.support.tiny import tokens

pytestmark = pytest.mark.usefixtures("command")
ROOT = Path(__file__).parents[2]
STAGES = ["original", "rescaled", "rescaled and rotated"]
PICTURES = {"spectrum.png", "incoherence.png", "hessian_entries.png", "singular_vectors.png"}


def save_store(folder: Path, name: str, *, model_name: str = "tiny") -> tuple[str, str]:
    """A tiny model and a store of its Hessians."""
    where = save_model(folder / "model", name)
    loaded = load_model(where)
    facts = {"model": model_name, "calibration": {"dataset": "letters"}, "source": "original"}
    facts |= {"digest": identity_of(loaded), "dtype": "float32"}
    writer = StoreWriter(folder / "store", facts)
    for block in walk(loaded.model, tokens(), device="cpu"):
        writer.keep(block.index, block.observe())
    writer.close()
    return str(folder / "store"), where


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return save_store(tmp_path_factory.mktemp("opt"), "opt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_store(tmp_path_factory.mktemp("llama"), "llama")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_means_by_input_as_it_is_and_rotated(quip, opt):
    status, out, _ = quip("summary", opt[0])
    assert status == 0
    lines = out.splitlines()
    assert lines[0].endswith("tiny on letters, 84 tokens; 16 inputs of 24 matrices")
    start = next(i for i, line in enumerate(lines) if line.startswith("mean ±"))
    table = lines[start : lines.index("", start)]
    assert len({len(line) for line in table}) == 1
    assert [line.split(",")[0] for line in table[1::2]] == ["all", "k/v/q", "out", "fc1", "fc2"]
    assert [line.split()[2] for line in table[1::2]] == ["24", "12", "4", "4", "4"]
    assert all(", rotated" in line for line in table[2::2])
    assert "mu_W" not in out
    assert "the paper" not in out


def test_every_matrix_is_summarized_at_every_stage(quip, llama, tmp_path):
    store, model = llama
    status, out, _ = quip("summary", store, "--model", model, "--out", tmp_path / "a", "--seed", 3)
    assert status == 0
    assert "rescaled and rotated" in out
    assert "mu_W" in out
    found = rows(tmp_path / "a" / "matrices.csv")
    names = [name for one in HessianStore(Path(store)).inputs for name in one.matrices]
    assert [(row["name"], row["processing"]) for row in found] == [
        (name, stage) for name in names for stage in STAGES
    ]
    # The last stage is what `quip run --incoh_processing --seed 3` quantizes.
    recipe = build_recipe(wbits=2, incoh_processing=True)
    loaded = load_model(model).model
    for row in found[2::27]:
        W = loaded.get_parameter(f"{row['name']}.weight").double()
        H = HessianStore(Path(store)).read(row["name"]).H
        H.diagonal().add_(0.01 * H.diagonal().mean())
        _, W_t, _ = Chain.draw(recipe.transforms, W, H, rng_for(3, row["name"]))
        assert float(row["mu_W"]) == pytest.approx(weight_numbers(W_t).mu_W, rel=1e-12)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    tables = {"hessians.csv", "matrices.csv", "summary.json", "spectra.safetensors"}
    assert files == tables | PICTURES | {"weights.png"}
    for name in (*PICTURES, "weights.png"):
        assert (tmp_path / "a" / name).read_bytes().startswith(b"\x89PNG")


def test_spectra_are_kept_and_are_those_of_the_store(quip, opt, tmp_path):
    assert quip("summary", opt[0], "--out", tmp_path / "a")[0] == 0
    assert {path.name for path in (tmp_path / "a").glob("*.png")} == PICTURES
    assert not (tmp_path / "a" / "matrices.csv").exists()
    store, spectra = HessianStore(Path(opt[0])), load_file(tmp_path / "a" / "spectra.safetensors")
    assert set(spectra) == {f"{one.name}, original" for one in store.inputs}
    for one in store.inputs:
        expected = torch.linalg.eigvalsh(store.read(one.name).H).flip(0)
        torch.testing.assert_close(spectra[f"{one.name}, original"], expected.clamp_min(0))
    listed = rows(tmp_path / "a" / "hessians.csv")
    assert [row["processing"] for row in listed] == ["original", "rotated"] * len(store.inputs)
    assert {row["tokens"] for row in listed} == {"84"}
    # What a rotation leaves.
    for before, after in zip(listed[::2], listed[1::2], strict=True):
        for key in ("rank", "above_1_percent", "root", "log10_condition"):
            assert before[key] == after[key]


def test_json_is_what_summary_json_holds_and_pictures_are_optional(
    quip, opt, tmp_path, monkeypatch
):
    monkeypatch.setattr("quip.jobs.report.plots.find_spec", lambda package: None)
    store, model = opt
    line = ("summary", store, "--model", model, "--no_rescale", "--rotation", "blocked", "--json")
    status, out, _ = quip(*line, "--out", tmp_path)
    found = json.loads(out)
    assert status == 0
    assert found == json.loads((tmp_path / "summary.json").read_text())
    assert list(tmp_path.glob("*.png")) == []
    assert (found["rotation"], found["rescale"], found["percdamp"]) == ("blocked", False, 0.01)
    assert {row["processing"] for row in found["matrices"]} == {"original", "rotated"}
    whole = next(m for m in found["hessian_means"] if m["role"] == "all")
    shares = [row["D_backwards"] for row in found["matrices"] if row["processing"] == "original"]
    assert whole["count"] == len(shares) == 24
    assert whole["D_backwards"]["mean"] == pytest.approx(sum(shares) / len(shares))
    # Without weights an input counts once for each matrix that it feeds.
    other = json.loads(quip("summary", store, "--json")[1])["hessian_means"][0]
    assert other["D_backwards"] == pytest.approx(whole["D_backwards"])


def test_more_damping_brings_tr_d_nearer_to_tr_h(quip, opt):
    shares = []
    for damp in (0.01, 1.0):
        found = json.loads(quip("summary", opt[0], "--percdamp", damp, "--json")[1])
        shares.append(found["hessian_means"][0]["D_backwards"]["mean"])
    assert shares[0] < shares[1] < 1


def test_the_paper_stands_beside_its_models(quip, tmp_path):
    store, _ = save_store(tmp_path, "opt", model_name="facebook/opt-125m")
    out = quip("summary", store)[1].splitlines()
    row = next(line for line in out if line.startswith("QuIP, Table 6, baseline"))
    assert row.split()[4:7] == ["0.926", "0.112", "0.540"]
    row = next(line for line in out if line.startswith("QuIP, Table 6, IncP"))
    assert row.split()[4:7] == ["0.910", "0.124", "0.534"]


REFUSED = {
    "--no_rescale": "name the model with --model",
    "--overwrite": "name the folder with --out DIR",
    "--layer x": "name a folder for them with --out DIR",
    "--layer x --out a": "--layer x: the store holds no such matrix; say model.decoder.layers.2",
    "--rotation dense": "invalid choice: 'dense'",
    "--percdamp -1": "damping is a finite share, 0 or more",
    "--model nowhere/at/all": "no such file or folder",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_means_nothing_is_refused_in_one_line(quip, opt, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    status, out, err = quip("summary", opt[0], *words.split())
    assert (status > 0, out, len(err)) == (True, "", 1)
    assert REFUSED[words] in err[0]
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_the_store_is_not_of_is_named(quip, opt, llama):
    status, _, [line] = quip("summary", opt[0], "--model", llama[1])
    assert status == 2
    assert "does not fit the model" in line


def test_the_heat_maps_show_the_layer_that_was_asked_for(quip, opt, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "quip.research.hessians.summary.write_plots",
        lambda summary, folder: shown.append([stage.name for stage in summary.example]),
    )
    name = "model.decoder.layers.1.self_attn.q_proj"  # which shares the input of k_proj
    assert (
        quip("summary", opt[0], "--model", opt[1], "--layer", name, "--out", tmp_path / "a")[0] == 0
    )
    assert quip("summary", opt[0], "--layer", name, "--out", tmp_path / "b")[0] == 0
    assert quip("summary", opt[0], "--out", tmp_path / "c")[0] == 0
    first = name.replace("q_proj", "k_proj")
    assert shown[0] == [first, name, name]
    assert shown[1] == [first, first]
    assert shown[2] == ["model.decoder.layers.2.fc2"] * 2


@pytest.mark.slow
def test_overwriting_leaves_nothing_of_the_summary_before(quip, opt, tmp_path):
    store, model = opt
    assert quip("summary", store, "--model", model, "--out", tmp_path / "a")[0] == 0
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert quip("summary", store, "--out", tmp_path / "a", "--overwrite")[0] == 0
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {"hessians.csv", "summary.json", "spectra.safetensors", "notes.txt"} | PICTURES


def test_a_folder_that_another_writes_to_is_left_alone(quip, opt, tmp_path):
    other = RunFolder(tmp_path / "a")
    other.open()
    status, _, [line] = quip("summary", opt[0], "--out", tmp_path / "a", "--overwrite")
    assert (status, "another run is writing to it" in line) == (2, True)
    other.release()
    status, _, [line] = quip("summary", opt[0], "--out", opt[0], "--overwrite")
    assert (status, "it is the store" in line) == (2, True)


def test_a_store_of_other_weights_is_warned_of(quip, opt, tmp_path, caplog):
    store, model = opt
    assert quip("summary", store, "--model", model)[0] == 0
    assert "not quite of this model" not in caplog.text
    tuned = load_model(model)
    tuned.model.get_parameter("model.decoder.layers.0.fc1.bias").fill_(0.5)
    for part in (tuned.model, tuned.tokenizer):
        part.save_pretrained(tmp_path / "tuned")
    assert quip("summary", store, "--model", tmp_path / "tuned")[0] == 0
    assert f"the store {store} is not quite of this model (weights was" in caplog.text


@pytest.mark.parametrize("pictures", [False, True])
def test_no_matrix_outlives_the_stage_after_it(opt, tmp_path, monkeypatch, pictures):
    monkeypatch.setattr("quip.research.hessians.rows.PIXELS", 8)
    alive, counts = weakref.WeakSet(), []

    def watched(*args: Any) -> Iterator[tuple[Stage, torch.Tensor]]:
        for stage, W in processed(*args):
            alive.add(stage)
            counts.append(len(alive))
            yield stage, W

    monkeypatch.setattr("quip.research.hessians.summary.processed", watched)
    out = tmp_path if pictures else None
    found = summarize(SummaryRequest(store=Path(opt[0]), model=opt[1], out=out, pictures=pictures))
    assert max(counts) == 3  # as collected, the one before, the next
    assert len(alive) == 0
    assert [one.processing for one in found.example] == (STAGES if pictures else [])
    for one in found.example:
        assert one.entries.shape == one.vectors.shape == (8, 8)
    assert all(row.spectrum.untyped_storage().nbytes() == 8 * row.columns for row in found.inputs)


def door(monkeypatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["compute_Hsummary.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "compute_Hsummary.py"), run_name="__main__")
    return ended.value.code


def test_the_published_command_line_writes_the_folder(opt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("quip.jobs.report.plots.find_spec", lambda package: None)
    saved = tmp_path / "a"
    assert door(monkeypatch, "--dirname", opt[0], "--savename", str(saved)) == 0
    assert "tr(D)/tr(H)" in capsys.readouterr().out
    assert (saved / "summary.json").is_file()
    assert door(monkeypatch, "--dirname", opt[0], "--savename", str(saved)) == 2
    assert "it exists and is not empty" in capsys.readouterr().err
    assert door(monkeypatch, "--dirname", opt[0], "--savename", str(saved), "--zork") == 2
    assert "unrecognized arguments: --zork" in capsys.readouterr().err
    assert door(monkeypatch, "--dirname", opt[0]) == 2
    assert "--savename" in capsys.readouterr().err
