"""`quip hessians` and `quip run --hessians`: what they print, and what they refuse before work."""

import json
import shutil
from pathlib import Path

import pytest

from quip.jobs.hessians import Collection, collect_hessians
from tests.support.runs import save_model, write_text

DATA = ("--nsamples", "6", "--seqlen", "24")
FAST = ("--wbits", "4", "--quant", "nearest", "--proxy_only")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "opt")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("texts") / "train.txt")


@pytest.fixture(scope="module")
def store(model, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "store"
    collect_hessians(Collection(model=model, dataset=text, save=folder, nsamples=6, seqlen=24))
    return folder


def test_a_store_is_made_and_quantized_from(quip, model, text, tmp_path):
    store = tmp_path / "store"
    status, words, err = quip("hessians", model, text, "--save", store, *DATA)
    assert status == 0, err
    size = sum(path.stat().st_size for path in store.glob("*.safetensors"))
    assert words.startswith(f"{store}: 16 inputs of 24 matrices, 144 tokens, {size / 1e3:.2f} kB, ")
    assert words.endswith(
        f"; quantize from it with: quip run {model} --hessians {store} --wbits 2\n"
    )
    save = tmp_path / "saved"
    status, words, err = quip("run", model, "--hessians", store, *FAST, "--save", save)
    assert status == 0, err
    run, manifest = (
        json.loads((x).read_text()) for x in (save / "run.json", store / "manifest.json")
    )
    assert run["calibration"] == manifest["calibration"]
    assert run["dataset"] == text
    assert run["hessians"] == str(store)
    card = (save / "README.md").read_text()
    assert f"quip run {Path(model).name} --wbits 4" in card
    assert "--hessians store " in card


def test_the_manifest_says_what_the_store_is_of(quip, model, text, tmp_path):
    how = ("--from", "quantized", "--recipe", "quip-2bit", "--seed", "1")
    assert quip("hessians", model, text, "--save", tmp_path / "store", *DATA, *how)[0] == 0
    found = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert found["model"] == model
    assert found["source"]["codebook"]["bits"] == 2
    assert found["calibration"]["dataset"] == text
    assert (found["seed"], found["dtype"], found["complete"]) == (1, "float32", True)
    assert found["digest"].keys() == {"class", "config", "weights"}
    assert {"torch", "quip-quant"} <= found["versions"].keys()
    assert [one["count"] for one in found["inputs"]] == [144] * 16


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (("--wbits", "4", "--incoh_processing"), "--wbits 4 --incoh_processing"),
        (("--codebook", "E8P12", "--seed", "3"), "--codebook E8P12 --seed 3"),
        (("--recipe", "quip-2bit", "--quant", "gptq"), "--wbits 2 --quant gptq --incoh_processing"),
    ],
    ids=str,
)
def test_a_store_of_a_quantized_model_is_to_be_used_with_its_own_recipe(
    quip, model, text, tmp_path, given, shown
):
    store = tmp_path / "store"
    how = ("--from", "quantized", *given)
    words = quip("hessians", model, text, "--save", store, *DATA, *how)[1]
    assert words.endswith(f": quip run {model} --hessians {store} {shown}\n")
    fast = ("--proxy_only", "--save", tmp_path / "saved")
    assert quip("run", *words.split("quip run ")[1].split(), *fast)[0] == 0


def test_a_damaged_manifest_is_one_line_with_the_remedy(quip, model, text, tmp_path, store):
    damaged = shutil.copytree(store, tmp_path / "store")
    words = json.loads((damaged / "manifest.json").read_text())
    del words["inputs"][2]["name"]
    (damaged / "manifest.json").write_text(json.dumps(words))
    again = ("hessians", model, text, "--save", damaged, *DATA)
    for line in (("run", model, "--hessians", damaged, *FAST), (*again, "--resume")):
        status, out, err = quip(*line)
        assert (status, out) == (1, "")
        assert err[-1].endswith(
            "manifest.json is damaged (inputs[2].name is missing); make it anew with --overwrite"
        )
    assert quip(*again, "--overwrite")[0] == 0
    assert {x.name for x in damaged.iterdir()} == {x.name for x in store.iterdir()}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--wbits", "2"), "--wbits says how to quantize, and --from original does not"),
        (("--incoh_processing",), "--incoh_processing says how to quantize"),
        (("--from", "quantized"), "--from quantized needs weights to quantize: give --wbits"),
        (("--from", "quantized", "--wbits", "2", "--rho", "1"), "--rho 1.0 speaks of"),
        (("--resume", "--overwrite"), "leave one out"),
        (("--nsamples", "0"), "--nsamples 0: at least 1"),
    ],
)
def test_stores_that_mean_nothing_are_refused(quip, tmp_path, words, reason):
    status, out, err = quip("hessians", "demo", "pydoc", "--save", tmp_path / "store", *words)
    assert (status, out) == (2, "")
    assert reason in err[-1]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--wbits", "2"), "the following arguments are required: dataset"),
        (("pydoc", "--hessians", "DIR", "--wbits", "2"), "leave out DATASET (pydoc)"),
        (("--hessians", "DIR"), "--hessians needs weights to quantize"),
        (("--hessians", "DIR", "--wbits", "2", "--nsamples", "9"), "--nsamples 9 speaks of"),
        (
            ("--hessians", "DIR", "--wbits", "2", "--ft_epochs", "1", "--proxy_only"),
            "tuning needs activations",
        ),
        (("--hessians", "DIR", "--wbits", "2"), "say where to measure perplexity"),
    ],
)
def test_runs_that_mean_nothing_are_refused(quip, store, words, reason):
    words = [store if word == "DIR" else word for word in words]
    status, out, err = quip("run", "./nowhere/at-all", *words)
    assert (status, out) == (2, "")
    assert reason in err[-1]


def test_a_store_of_another_model_is_refused_before_anything_runs(quip, store, tmp_path):
    other = save_model(tmp_path / "llama", "llama")
    out = tmp_path / "out"
    status, _, err = quip("run", other, "--hessians", store, *FAST, "--out", out)
    assert status == 2
    assert err[-1].startswith(f"quip: the store {store} does not fit the model: model.layers.0.")
    assert not out.exists()


def test_what_is_no_store_is_unavailable(quip, model, tmp_path):
    status, _, err = quip("run", model, "--hessians", tmp_path, *FAST)
    assert status == 1
    assert "quip hessians MODEL DATASET --save" in err[-1]


def test_a_store_is_not_overwritten_by_the_checkpoint_that_is_made_of_it(quip, model, store):
    save = ("--save", store.parent, "--overwrite")
    status, _, err = quip("run", model, "--hessians", store, *FAST, *save)
    assert status == 2
    assert store.exists()
    assert err


def test_data_sets_may_stand_behind_flags(quip, model, text, tmp_path):
    save = tmp_path / "store"
    assert quip("hessians", *DATA, model, "--save", save, text)[0] == 0
    assert quip("run", *DATA, model, *FAST, text)[0] == 0
    assert quip("run", "--hessians", save, *FAST, model)[0] == 0
