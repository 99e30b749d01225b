"""`quip theory`, `quip counterexample`, `quip equivalence`: tables, files, and refusals."""

import csv
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from quip.cli.theory import claims

pytestmark = pytest.mark.usefixtures("command")
SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = {
    "theory": "--n 16 --rows 1000 --samples 3 --only lemma3,lemma13",
    "counterexample": "--n 8,16 --quant gptq,nearest",
    "equivalence": "--n 8,12 --wbits none,2",
}
PICTURES = {
    "theory": {"equalities.png", "bounds.png"},
    "counterexample": {"counterexample.png"},
    "equivalence": {"differences.png", "sizes.png"},
}
COMMANDS = pytest.mark.parametrize("name", SMALL)


@COMMANDS
def test_rows_on_paper_in_json_and_in_files_are_the_same(quip, name, tmp_path):
    out = tmp_path / "out"
    status, text, err = quip(name, *SMALL[name].split(), "--json", "--out", out)
    assert (status, err) == (0, [])
    found = json.loads(text)
    assert json.loads((out / f"{name}.json").read_text()) == found
    assert found["flags"]["json"] is True
    assert "torch" in found["versions"]
    assert {path.name for path in out.iterdir()} == PICTURES[name] | {f"{name}.csv", f"{name}.json"}
    with (out / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["rows"])
    assert list(rows[0]) == list(found["rows"][0])


@COMMANDS
def test_without_matplotlib_the_files_come_without_pictures(quip, name, tmp_path, monkeypatch):
    monkeypatch.setattr("quip.jobs.report.plots.find_spec", lambda package: None)
    status, _, _ = quip(name, *SMALL[name].split(), "--out", tmp_path / "out")
    assert status == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{name}.csv", f"{name}.json"}


@COMMANDS
def test_a_folder_with_files_is_refused_before_anything_is_measured(quip, name, tmp_path):
    (tmp_path / "mine").write_text("")
    status, out, [line] = quip(name, "--out", tmp_path)
    assert (status, out) == (2, "")
    assert "add --overwrite" in line
    status, out, [line] = quip(name, "--overwrite")
    assert (status, out) == (2, "")
    assert "name one with --out DIR" in line
    status, _, _ = quip(name, *SMALL[name].split(), "--out", tmp_path, "--overwrite")
    assert status == 0
    assert not (tmp_path / "mine").exists()


def test_theory_is_a_block_for_each_group_and_a_count_of_verdicts(quip):
    status, out, err = quip("theory", *SMALL["theory"].split())
    assert (status, err) == (0, [])
    lemma_3, lemma_13, total = out.strip().split("\n\n")
    assert lemma_3.startswith("Lemma 3: rounding without feedback")
    assert len({len(line) for line in lemma_3.splitlines()}) == 1
    row = next(line for line in lemma_3.splitlines() if "nearest, W = 1/2" in line)
    assert row.split()[-2:] == ["1.0000", "holds"]
    assert "of 3 runs <= 0.1 x 3" in lemma_13
    assert total.startswith("8 claims: holds ")


def test_theory_names_all_its_groups(capsys):
    from quip.cli.parse import Parser
    from quip.research.theory import GROUPS

    parser = Parser()
    claims.build(parser)
    [only] = [action for action in parser._actions if action.dest == "only"]
    assert f"groups of claims: {', '.join(GROUPS)} (default: all)" in only.help


def test_the_counterexample_is_a_line_for_each_size(quip):
    status, out, _ = quip("counterexample", "--n", "16,64", "--quant", "gptq,nearest")
    assert status == 0
    title, head, *lines = filter(None, out.splitlines())
    assert title == "tr(E H E^T), W in code units"
    assert head.split()[:4] == ["n", "rows", "gptq", "nearest"]
    assert [line.split() for line in lines] == [
        ["16", "16", "633.994", "59.8463", "0.5161"],
        ["64", "16", "14642.3", "251.098", "0.5039"],
    ]


def test_equivalence_counts_no_differing_code(quip):
    status, out, _ = quip("equivalence", "--n", "8,12", "--rows", 5, "--wbits", "none,3")
    assert status == 0
    _, head, *lines = filter(None, out.splitlines())
    assert head.split()[:5] == ["rows", "x", "n", "grid", "differing"]
    cells = [re.split("  +", line)[:3] for line in lines]
    grids = ("whole numbers", "3 bits")
    assert cells == [[f"5 x {n}", grid, "0"] for n in (8, 12) for grid in grids]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("theory --only lemma3,lemma99", "--only lemma99: not one of theorem1, lemma3"),
        ("theory --n 15", "--n 15: at least 16 is needed"),
        ("theory --rows 999", "--rows 999: at least 1000 is needed"),
        ("theory --samples 1", "--samples 1: at least 2 is needed"),
        ("counterexample --n 16,2", "'2' is no whole number of at least 3"),
        ("counterexample --n x", "'x' is no whole number"),
        ("counterexample --rows 0", "--rows"),
        ("counterexample --quant gptq,best", "--quant best: not one of gptq, unclamped"),
        ("counterexample --c 0", "--c 0.0: a number between 0 and 1 is needed"),
        ("counterexample --wbits 9", "--wbits"),
        ("equivalence --wbits none,9", "'9' is no whole number from 1 to 8"),
        ("equivalence --n 1", "'1' is no whole number of at least 2"),
        ("equivalence --dtype float16", "--dtype"),
    ],
)
def test_what_means_nothing_is_one_line_and_status_2(quip, words, reason):
    status, out, [line] = quip(*words.split())
    assert (status, out) == (2, "")
    assert reason in line


def run_script(name: str, *words: str, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return ended.value.code


def test_the_scripts_are_doors_to_the_commands(monkeypatch, capsys):
    assert run_script("optq_counter.py", "--n", "16,32", monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-2:]] == [["16", "16"], ["32", "32"]]
    assert run_script("optq_ldlq_equiv.py", "--n", "20", monkeypatch=monkeypatch) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.split("  +", last)[:3] == ["20 x 20", "whole numbers", "0"]
    for name in ("optq_counter.py", "optq_ldlq_equiv.py"):
        assert run_script(name, "--slow", monkeypatch=monkeypatch) == 2
        assert "unrecognized arguments: --slow" in capsys.readouterr().err
