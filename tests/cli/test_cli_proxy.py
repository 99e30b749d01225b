"""`quip proxy`: its flags become a bench, and its means a table."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.support.hessians import observed, written
from tests.support.runs import save_model, write_text

pytestmark = pytest.mark.usefixtures("command")
DOOR = Path(__file__).parents[2] / "scripts" / "opt_proxy.py"


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("here")
    written(folder / "store", observed("opt"))
    return save_model(folder / "opt"), folder / "store"


def test_means_of_all_methods_are_printed_and_every_loss_is_kept(quip, here, tmp_path):
    flags = ("--wbits", "2,3", "--processing", "baseline,incoherence", "--layers", "layers.0.fc1")
    status, out, _ = quip("proxy", *here, *flags, "--out", tmp_path, "--device", "cpu")
    assert status == 0
    parts = [part.splitlines() for part in out.split("\n\n")]
    assert [part[0].split("  ")[0] for part in parts[:-1]] == [
        f"mean {what}, {processing}"
        for what in ("proxy loss", "tr(E H E^T)")
        for processing in ("baseline", "incoherence")
    ]
    for part in parts[:-1]:
        assert [line.split()[0] for line in part[1:]] == [
            *("nearest", "gptq", "ldlq", "ldlqRG", "allbal", "ldlbal_admm"),
        ]
        assert part[0].split()[-4:] == ["3", "bits", "2", "bits"]
        for line in part[1:]:
            assert float(line.split()[1]) < float(line.split()[2])  # more bits lose less
    assert parts[-1] == [f"over 1 matrices; each of them in {tmp_path}"]
    assert len((tmp_path / "proxy.csv").read_text().splitlines()) == 1 + 6 * 2 * 2


def test_incoh_processing_is_the_papers_word_for_incoherence_alone(quip, here):
    flags = ("--quant", "nearest", "--wbits", "2", "--layers", "fc1", "--device", "cpu")
    short = quip("proxy", *here, *flags, "--incoh_processing")
    assert short == quip("proxy", *here, *flags, "--processing", "incoherence")
    assert "baseline" not in short[1]
    assert "incoherence" not in quip("proxy", *here, *flags)[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--incoh_processing", "--processing", "baseline"], "leave one of them out"),
        (["--wbits", "2,x"], "--wbits 2,x: numbers are needed, as in --wbits 2,3"),
        (["--wbits", "2", "--codebook", "E8P12"], "lattices have their own bits; leave it out"),
        (["--quant", "all,ldlq"], "--quant all: not one of nearest"),
        (["--rho", "wide"], "--rho wide: a positive number or auto is needed"),
        (["--rho", "-1", "--incoh_processing"], "--rho -1.0: a positive number or auto is needed"),
        (["--resume"], "--resume speaks of a folder: name it with --out DIR"),
        (["--overwrite"], "--overwrite speaks of a folder: name it with --out DIR"),
        (["--out", "x", "--resume", "--overwrite"], "leave one out"),
        (["--npasses", "0"], "--quant allbal --npasses 0 would round nothing"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_means_nothing_is_one_line(quip, here, flags, message):
    status, out, err = quip("proxy", *here, *flags)
    assert (status, out, len(err)) == (2, "", 1)
    assert message in err[0]


def test_a_folder_that_is_no_store_is_named_with_the_remedy(quip, here, tmp_path):
    status, _, err = quip("proxy", here[0], tmp_path)
    assert status == 1
    assert "quip hessians" in err[-1]


def test_damping_of_zero_is_said_and_not_left_out(quip, here, tmp_path):
    flags = ("--quant", "nearest", "--wbits", "2", "--layers", "layers.0.fc1", "--out", tmp_path)
    assert quip("proxy", *here, *flags, "--percdamp", "0", "--device", "cpu")[0] == 0
    (line,) = csv.DictReader((tmp_path / "proxy.csv").read_text().splitlines())
    assert float(line["damp"]) == 0


def test_run_takes_rho_auto_from_a_file(quip, here, tmp_path):
    text, flags = write_text(tmp_path / "a.txt"), tmp_path / "flags.yaml"
    flags.write_text("rho: auto\nincoh_processing: true\nwbits: 2\nproxy_only: true\n")
    machine = ("--nsamples", "2", "--seqlen", "12", "--device", "cpu", "--out", tmp_path / "out")
    assert quip("run", here[0], text, "--config", flags, *machine)[0] == 0
    trials = json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]["trials"]
    assert [len(book["rhos"]) for book in trials] == [10, *7 * [1]]


# The door of the paper's script


@pytest.fixture
def door(command, capsys, monkeypatch, tmp_path):
    def call(*words: object) -> tuple[int, str, list[str]]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["opt_proxy.py", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(DOOR), run_name="__main__")
        out, err = capsys.readouterr()
        return left.value.code, out, err.splitlines()

    return call


def test_the_door_refuses_what_means_nothing_before_it_collects(door, here, tmp_path):
    for flags in (["--rho", "2"], ["--wbots", "4"]):
        status, out, err = door("pydoc", "--model", here[0], *flags)
        assert (status, out, len(err)) == (2, "", 1)
    assert not list(tmp_path.iterdir())


def test_the_door_collects_what_is_not_there_and_prints_what_the_command_prints(
    door, quip, here, tmp_path
):
    """Once for each store that its flags ask for."""
    text = write_text(tmp_path / "text.txt")
    flags = ("--wbits", "4", "--quant", "ldlq", "--device", "cpu")
    status, out, _ = door(text, "--model", here[0], "--nsamples", "2", *flags)
    collected, table = out.split("\n", 1)
    assert status == 0
    assert collected.startswith("runs/hessians-opt-text.txt-")
    assert ": 16 inputs of 24 matrices, 64 tokens" in collected
    (store,) = (tmp_path / "runs").iterdir()
    assert quip("proxy", here[0], store, *flags)[:2] == (0, table)
    assert door(text, "--model", here[0], "--hessians", store, *flags)[:2] == (0, table)
    for further in ([], ["--seqlen", "12"], ["--seed", "1"], ["--dtype", "bfloat16"]):
        words = (text, "--model", here[0], "--nsamples", "2", *flags, *further)
        assert door(*words)[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 4
