"""`quip table`: listed, estimated, run and shown, on a tiny model."""

import re

import pytest

from quip.research.tables import estimate
from quip.research.tables.cells import Settings, cells
from quip.research.tables.description import read_table
from quip.research.tables.selection import select
from tests.support.runs import save_model, write_text


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


def test_a_table_is_estimated_run_and_shown(quip, asked, tmp_path):
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


def test_an_estimate_grows_with_what_is_asked_for(monkeypatch, asked, tmp_path):
    monkeypatch.setattr(estimate, "product_rate", lambda device, dtype: 1e9)
    table = select(read_table("perplexity"), columns=("2 bits",))

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


def test_an_estimate_counts_what_learning_codebooks_takes(monkeypatch, asked, tmp_path):
    monkeypatch.setattr(estimate, "product_rate", lambda device, dtype: 1e9)
    settings = Settings(dataset="c4", evaluate=("a",), seqlen=16)
    seconds = {}
    for name in ("gptvq_update", "gptvq_iterations"):
        found = list(cells(read_table(name), [asked[1]], settings, tmp_path))
        for cell, one in zip(found, estimate.estimates(found), strict=True):
            words = (cell.flags[k] for k in ("wbits", "vq_dim"))
            learning = cell.flags.get("codebook_update"), cell.flags.get("em_iters")
            seconds[(*words, *learning)] = one.seconds
    assert seconds[2, 2, "none", None] < seconds[2, 2, None, None]  # updated
    assert seconds[3, 1, None, None] < seconds[3, 2, None, None]  # 64 centroids
    assert seconds[3, 2, None, 10] < seconds[3, 2, None, 30]


def test_an_estimate_counts_the_states_of_a_trellis(monkeypatch, asked, tmp_path):
    monkeypatch.setattr(estimate, "product_rate", lambda device, dtype: 1e9)
    settings = Settings(dataset="c4", evaluate=("a",), seqlen=16)
    found = list(cells(read_table("trellis_states"), [asked[1]], settings, tmp_path))
    seconds = {
        cell.flags.get("trellis_states"): one.seconds
        for cell, one in zip(found, estimate.estimates(found), strict=True)
    }
    assert 0 < seconds[8] < seconds[10] < seconds[12]
