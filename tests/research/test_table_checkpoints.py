"""Cells that start from a checkpoint: it is made once, tuned, loaded again, and not kept."""

import pytest

from quip.research.tables import quantized
from quip.research.tables.cells import Settings, cells
from quip.research.tables.description import read_table
from quip.research.tables.entries import entries
from quip.research.tables.running import run_missing
from quip.research.tables.selection import select, settle
from tests.support.runs import save_model, write_text

TUNED = """
title: Tuning
source: A test
models: []
evaluate: [pydoc]
measures:
  bits: {path: [totals, bits_per_weight]}
  perplexity: {path: [mean_perplexity]}
  before: {path: [held_out_kl, before]}
  after: {path: [held_out_kl, after]}
  minutes: {path: [minutes]}
rows:
  plain: {codebook: E8P12}
  b: {codebook: E8P12, finetune: &b {epochs: 1, nsamples: 3, lr: 0.01}}
  a: {codebook: E8P12, ft_epochs: 1, ft_held_out: 0.5}
  ab: {codebook: E8P12, ft_epochs: 1, ft_held_out: 0.5, finetune: *b}
columns: {all: {}}
"""


@pytest.fixture
def own(tmp_path):
    """A table of tuned cells, and what it takes to run it."""
    (tmp_path / "tuned.yaml").write_text(TUNED)
    model, text = save_model(tmp_path / "tiny"), write_text(tmp_path / "text.txt")
    settings = Settings(dataset=text, evaluate=(text,), nsamples=4, seqlen=16)
    table = settle(read_table(str(tmp_path / "tuned.yaml")), settings)
    return table, [model], settings, tmp_path / "out"


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """What has been quantized."""
    found, run = [], quantized.run_experiment
    monkeypatch.setattr(
        quantized, "run_experiment", lambda asked: found.append(asked.method) or run(asked)
    )
    return found


@pytest.mark.slow
def test_a_checkpoint_is_quantized_once_for_all_that_is_tuned_of_it(own, ran):
    run_missing(list(cells(*own)))
    run_missing(list(cells(*own)))  # what a cell cannot have is not missing
    assert ran == ["codebook=E8P12", "codebook=E8P12 ft_epochs=1 ft_held_out=0.5"]
    ours = {(e.row, e.measure): e.ours for e in entries(*own)}
    for row in ("plain", "a"):
        assert ours[row, "before"] is ours[row, "after"] is None
    for row in ("b", "ab"):
        assert ours[row, "bits"] == ours["plain", "bits"]
        assert ours[row, "before"] > 0
    assert all(ours[row, "perplexity"] > 1 and ours[row, "minutes"] > 0 for row in ("b", "ab"))
    assert ours["plain", "perplexity"] != ours["a", "perplexity"]
    assert not list(own[-1].rglob("*.safetensors"))


def test_a_tuning_that_was_stopped_takes_the_checkpoint_that_is_there(own, ran, monkeypatch):
    table, *rest = own
    wanted = list(cells(select(table, rows=("b",)), *rest))

    def stop(asked: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantized, "finetune_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            run_missing(wanted)
    assert wanted[0].checkpoint.is_dir()
    run_missing(wanted)
    assert ran == ["codebook=E8P12"]
    assert not wanted[0].missing()
    run_missing(list(cells(select(table, rows=("plain",)), *rest)))
    assert ran == ["codebook=E8P12"]  # what was tuned had been evaluated before


@pytest.mark.slow
def test_a_saved_checkpoint_gives_the_same_in_a_new_process_and_takes_what_was_reported(own):
    _, models, settings, root = own
    table = select(read_table("checkpoints"), rows=("LDLQ + IncP, 2 bits",))
    table = settle(table, settings)
    run_missing(list(cells(table, models, settings, root)))
    ours = {e.measure: e.ours for e in entries(table, models, settings, root)}
    assert ours["in a new process"] == ours["perplexity"] > 1
    assert ours["change of logits"] == 0
    assert ours["bits as stored"] == ours["bits reported"]
    assert ours["file beyond reported, %"] > 0
    assert all(ours[name] > 0 for name in ("file, MB", "prefill, tokens/s", "dense decode"))
    assert not list(root.rglob("*.safetensors"))
