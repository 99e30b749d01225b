"""`quip table`: listed, estimated, run and shown, on a tiny model."""

import re
from dataclasses import fields, replace

import pytest

from quip.jobs.forecast.rates import Left, Rates, Rounding
from quip.matrix.recipe import Recipe
from quip.research.tables import estimate
from quip.research.tables.cells import Settings, cells
from quip.research.tables.description import read_table
from quip.research.tables.selection import select
from tests.support.runs import save_model, write_text


@pytest.fixture
def machine(monkeypatch):
    """One that does a thousand million of anything a second, whatever the recipe."""
    rates = Rates(**dict.fromkeys((field.name for field in fields(Rates)), 1e9))

    def measured(recipe: Recipe, *machine: object, real=estimate.measured_rounding) -> Rounding:
        same = Left(column=1e-4, weight=1e-8)
        return replace(real(recipe, *machine), quantize=same, forward=same)

    monkeypatch.setattr(estimate, "measured_rates", lambda *machine: rates)
    monkeypatch.setattr(estimate, "measured_rounding", measured)


@pytest.fixture
def asked(tmp_path):
    """The flags of a small table on a tiny model, all but its name."""
    model, text = save_model(tmp_path / "tiny"), write_text(tmp_path / "text.txt")
    words = ["--models", model, "--dataset", text, "--eval_datasets", text, "--nsamples", "4"]
    return [*words, "--seqlen", "16", "--columns", "2 bits", "--out", str(tmp_path / "out")]


def test_tables_are_listed_with_what_stands_in_them(quip):
    status, out, err = quip("table", "--list")
    assert (status, err) == (0, [])
    assert re.search(r"^perplexity +Perplexity by method", out, re.MULTILINE)
    assert "QuIP, Table 16" in out
    status, out, err = quip("table", "perplexity", "--list")
    assert (status, err) == (0, [])
    assert "columns      4 bits; 3 bits; 2 bits" in out
    assert "facebook/opt-66b" in out


def test_a_table_is_estimated_run_and_shown(quip, machine, asked, tmp_path):
    line = ("table", "perplexity", *asked, "--rows", "original; QuIP")
    status, out, _ = quip(*line, "--dry_run")
    assert status == 0
    [original, quantized] = [words for words in out.splitlines() if words.startswith("tiny/")]
    assert original.split()[1:3] == ["not", "run"]
    assert "min" in quantized
    assert "missing cells: about" in out
    assert not (tmp_path / "out").exists()

    status, out, _ = quip(*line)
    assert status == 0
    assert "| tiny | 2 bits |" in out
    assert out.count("| original |") == out.count("| QuIP |") == 1
    assert "- |" not in out
    shown = (tmp_path / "out" / "perplexity.md").read_text()
    assert shown in out
    assert (tmp_path / "out" / "perplexity.png").exists()

    status, out, _ = quip(*line, "--dry_run")
    assert (status, out.count(" done ")) == (0, 2)
    assert "missing cells: about 0.0 min" in out


def test_what_is_not_run_is_shown_as_a_dash(quip, asked):
    status, out, err = quip("table", "perplexity", *asked, "--render")
    assert (status, err) == (0, [])
    assert "| QuIP | - |" in out
    assert "A dash was not run." in out


def test_a_table_of_hessians_is_estimated_too(quip, machine, asked):
    words = [*asked[:4], *asked[6:10], "--columns", "all"]
    status, out, _ = quip("table", "hessians", *words, "--dry_run")
    assert status == 0
    assert out.count("not run") == 2


def test_a_model_that_cannot_be_had_has_no_estimate_and_says_why(quip, asked):
    asked[1] = "./nowhere/model"
    status, out, _ = quip("table", "perplexity", *asked, "--dry_run")
    assert status == 0
    assert "./nowhere/model: no such file or folder" in out


def test_what_cannot_be_done_is_one_line(quip, asked):
    for words, match in (
        ((), "name a table, or --list them"),
        (("nothing",), "table nothing: choose algorithm5"),
        (("perplexity", "--rows", "Far"), "--rows Far: perplexity has original; OPTQ"),
        (("perplexity", "--columns", "9 bits"), "--columns 9 bits: perplexity has 4 bits"),
        (("perplexity", "--dry_run", "--render"), "leave one out"),
        (("perplexity", "--nsamples", "0"), "--nsamples 0: at least 1"),
        (("proxy", "--eval_datasets", "pydoc"), "proxy measures neither texts nor tasks"),
        (("hessians", "--tasks", "piqa"), "hessians measures neither texts nor tasks"),
        (("perplexity", "--limit", "3"), "--limit speaks of zero-shot tasks"),
        (("perplexity", "--models", "a/m,b/m"), "two of them are shown as m"),
    ):
        status, out, [line] = quip("table", *words)
        assert (status, out) == (2, "")
        assert match in line


def test_an_estimate_grows_with_what_is_asked_for(machine, asked, tmp_path):
    rows = ("original", "Greedy", "Near")
    table = select(read_table("perplexity"), rows=rows, columns=("2 bits",))

    def seconds(**changes: object) -> dict[str, float]:
        settings = Settings(**{"dataset": "c4", "evaluate": ("a",), "seqlen": 16, **changes})
        asked_for = list(cells(table, [asked[1]], settings, tmp_path))
        found = zip(asked_for, estimate.estimates(asked_for), strict=True)
        return {str(sorted(cell.flags.items())): one.seconds for cell, one in found}

    few, many, short = seconds(nsamples=4), seconds(nsamples=64), seconds(eval_nsamples=1)
    for flags in few:
        if "('wbits', 16)" in flags:  # the original is not calibrated
            assert many[flags] == few[flags]
            assert short[flags] < few[flags]
        else:
            assert many[flags] > few[flags]
    plain = "[('quant', '{}'), ('wbits', 2)]"
    greedy, nearest = few[plain.format("allbal")], few[plain.format("nearest")]
    assert nearest < greedy


def test_an_estimate_counts_what_is_done_beside_rounding(machine, asked, tmp_path):
    table = read_table("frontier")
    rows = ("2 bits: E8P", "2 bits: E8P, token weights", "2 bits: E8P, target")
    rows += ("2 bits: E8P, two-sided", "original")
    settings = Settings(dataset="c4", evaluate=("a",), seqlen=16, nsamples=64)
    found = list(cells(select(table, rows=rows), [asked[1]], settings, tmp_path))
    original, plain, weighted, aimed, sided = (one.seconds for one in estimate.estimates(found))
    assert original < plain < weighted < aimed
    assert weighted < sided
