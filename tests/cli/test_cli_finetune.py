"""`quip finetune`: from one checkpoint to another, and what it refuses before any work."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from quip import cli
from quip.evaluate.divergence import divergence
from quip.jobs.inspect import inspect_checkpoint
from quip.matrix.build import build_recipe
from quip.model.load import load_model
from quip.packed.checkpoint import load
from tests.support.checkpoints import save_quantized
from tests.support.runs import write_text
from tests.support.tiny import tokens

VECTORS = build_recipe(wbits=2, codebook="vq", vq_dim=2, groupsize=256, columns_per_group=16)
LATTICE = build_recipe(quant="ldlq", codebook="E8P12")
FAST = ["--epochs", "2", "--lr", "1e-3", "--signs_lr", "1e-2", "--nsamples", "24", "--seqlen", "16"]


@pytest.fixture(autouse=True)
def registered(monkeypatch, command):
    from quip.cli import finetune

    monkeypatch.setitem(cli.COMMANDS, "finetune", finetune)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A checkpoint whose run.json names its original."""
    folder = tmp_path_factory.mktemp("checkpoints") / "opt"
    save_quantized(folder, recipe=LATTICE)
    run = json.loads((folder / "run.json").read_text())
    run |= {"model": f"{folder}-original", "fingerprint": {"seed": 0}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("texts") / "train.txt")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_tuned_checkpoint_is_nearer_to_the_original(quip, packed, text, tmp_path):
    before, out = files(packed), tmp_path / "tuned"
    status, words, err = quip("finetune", packed, text, "--save", out, *FAST)
    assert status == 0, err
    first, second = words.splitlines()
    assert first.startswith("KL divergence on 6 windows held out: ")
    assert second == f"{out}: the tuned checkpoint; measure it with: quip evaluate {out}"
    assert files(packed) == before
    teacher = load_model(f"{packed}-original").model
    kl = [divergence(load(x), teacher, tokens(), device="cpu").kl for x in (packed, out)]
    assert kl[1] < kl[0]


@pytest.mark.slow
def test_a_teacher_that_is_streamed_teaches_the_same(quip, packed, text, tmp_path):
    for mode in ("on", "off"):
        line = ("finetune", packed, text, "--save", tmp_path / mode, *FAST, "--stream", mode)
        status, _, err = quip(*line)
        assert status == 0, err
    weights = [(tmp_path / mode / "model.safetensors").read_bytes() for mode in ("on", "off")]
    assert weights[0] == weights[1]
    streamed, whole = (json.loads((tmp_path / m / "run.json").read_text()) for m in ("on", "off"))
    assert streamed["finetune"]["kl_after"] == whole["finetune"]["kl_after"]
    assert "teacher" in streamed["finetune"]["seconds"]
    assert "teacher" not in whole["finetune"]["seconds"]


def test_the_new_run_json_says_what_was_done_and_nothing_that_no_longer_holds(
    quip, packed, text, tmp_path
):
    out = tmp_path / "tuned"
    assert quip("finetune", packed, text, "--save", out, *FAST)[0] == 0
    run, earlier = (json.loads((x / "run.json").read_text()) for x in (out, packed))
    assert run["finetune"]["kl_after"] < run["finetune"]["kl_before"]
    assert run["finetune"]["before"] == {"perplexity": earlier["perplexity"]}
    assert run["finetune"]["tuning"]["epochs"] == 2
    assert run["finetune"]["tokens"]["windows"] == 24
    assert not {"perplexity", "fingerprint"} & run.keys()
    for key in ("model", "method", "matrices", "evaluation", "original_perplexity"):
        assert run[key] == earlier[key]
    assert "quip.load" in (out / "README.md").read_text()
    assert quip("inspect", out)[0] == 0


def test_the_centroids_of_a_checkpoint_are_tuned_and_saved(quip, text, tmp_path):
    folder, out = tmp_path / "vq", tmp_path / "tuned"
    save_quantized(folder, recipe=VECTORS)
    rates = ["--lr", "0", "--signs_lr", "0", "--centroids_lr", "5e-3"]
    line = ["finetune", folder, text, "--save", out, "--teacher", f"{folder}-original"]
    status, _, err = quip(*line, *FAST, *rates, "--epochs", "1")
    assert status == 0, err
    old, new = (load(x).state_dict() for x in (folder, out))
    moved = {name for name, x in old.items() if not torch.equal(x, new[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"centroids", "centroid_scale"}
    run = json.loads((out / "run.json").read_text())
    assert run["finetune"]["tuning"]["centroids_lr"] == 5e-3
    assert run["finetune"]["kl_after"] < run["finetune"]["kl_before"]
    before, after = (inspect_checkpoint(x, verify_tensors=True) for x in (folder, out))
    assert after["verification"]["damaged"] == 0
    for key in ("format", "bits_per_weight", "bytes_by_kind", "quantized_matrices"):
        assert after[key] == before[key]


@pytest.mark.slow
def test_a_checkpoint_without_run_json_needs_a_teacher_by_name(quip, packed, text, tmp_path):
    bare = Path(shutil.copytree(packed, tmp_path / "bare"))
    (bare / "run.json").unlink()
    line = ["finetune", bare, text, "--save", tmp_path / "tuned", *FAST]
    status, _, err = quip(*line)
    assert status == 2
    assert "name that with --teacher" in err[-1]
    assert quip(*line, "--teacher", f"{packed}-original")[0] == 0
    assert (tmp_path / "tuned" / "run.json").exists()


@pytest.mark.slow
def test_nothing_is_written_where_nothing_improves(quip, packed, text, tmp_path):
    out = tmp_path / "tuned"
    rates = ["--lr", "0", "--signs_lr", "0"]
    status, words, _ = quip("finetune", packed, text, "--save", out, *FAST, *rates)
    assert status == 0
    assert words.endswith("; nothing improved, so nothing is written\n")
    assert not out.exists()


def test_overwrite_replaces_a_checkpoint_and_nothing_else(quip, packed, text, tmp_path):
    out = Path(shutil.copytree(packed, tmp_path / "tuned"))
    line = ["finetune", packed, text, "--save", out, *FAST]
    assert "not empty" in quip(*line)[2][-1]
    assert quip(*line, "--overwrite")[0] == 0
    assert "finetune" in json.loads((out / "run.json").read_text())
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    status, _, err = quip("finetune", packed, text, "--save", other, *FAST, "--overwrite")
    assert status == 2
    assert "replaces checkpoints of quip only" in err[-1]


REFUSED = {
    "epochs": (["--epochs", "0"], "epochs 0: at least 1 is needed"),
    "rate": (["--lr", "nan"], "lr nan: a rate is finite"),
    "share": (["--held_out", "1"], "held_out 1.0: a share between 0 and 1"),
    "windows": (["--nsamples", "1"], "--nsamples 1: at least 2"),
    "data": (["--seqlen", "1"], "--seqlen 1: at least 2"),
    "device": (["--device", "abacus"], "--device abacus"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_numbers_are_refused_before_any_work(quip, packed, text, tmp_path, monkeypatch, name):
    from quip.jobs import finetune as saved

    def never(*args: object, **options: object) -> None:
        raise AssertionError("this is work that should not have been started")

    monkeypatch.setattr(saved, "load_model", never)
    flags, reason = REFUSED[name]
    status, _, err = quip("finetune", packed, text, "--save", tmp_path / "tuned", *flags)
    assert status == 2
    assert len(err) == 1
    assert reason in err[0]


def test_folders_that_cannot_be_are_refused(quip, packed, text, tmp_path):
    original = f"{packed}-original"
    assert "is not quantized" in quip("finetune", original, text, "--save", tmp_path / "x")[2][-1]
    line = quip("finetune", packed, text, "--save", packed, "--overwrite")[2][-1]
    assert f"{packed} is in it, and would be lost" in line


def test_a_quantized_teacher_is_refused_by_name(quip, packed, text, tmp_path):
    line = ["finetune", packed, text, "--save", tmp_path / "tuned", *FAST, "--teacher"]
    status, _, err = quip(*line, packed)
    assert status == 1
    assert f"the teacher {packed} is quantized itself" in err[-1]
    assert not (tmp_path / "tuned").exists()
