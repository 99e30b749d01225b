"""Cells whose predictions are compared with the original's, beside their perplexity."""

import pytest

from quip.errors import Unavailable, UsageError
from quip.jobs.evaluate import Evaluation, run_evaluation
from quip.research.tables import quantized
from quip.research.tables.cells import Settings, cells
from quip.research.tables.description import read_table
from quip.research.tables.entries import entries
from quip.research.tables.running import run_missing
from quip.research.tables.selection import settle
from tests.support.runs import save_model, write_text

OWN = """
title: What moves
source: A test
models: [facebook/opt-125m]
evaluate: [wikitext2]
measures:
  perplexity: {path: [mean_perplexity]}
  KL: {path: [compared, kl]}
  same text: {path: [compared, prefix], better: higher}
rows:
  original: {wbits: 16}
  near: {quant: nearest, wbits: 2}
  tuned: {quant: nearest, wbits: 2, incoh_processing: true, finetune: {epochs: 1}}
columns:
  all: {}
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine.yaml").write_text(OWN)
    table = read_table(str(tmp_path / "mine.yaml"))
    model, text = save_model(tmp_path / "tiny"), write_text(tmp_path / "text.txt")
    settings = Settings(dataset=text, evaluate=(text,), nsamples=4, seqlen=16, eval_nsamples=3)
    return settle(table, settings), [model], settings, tmp_path / "out"


def test_rows_are_compared_with_the_original_once_and_the_original_is_not(own, monkeypatch):
    asked = []
    real = quantized.run_evaluation

    def seen(evaluation: Evaluation):
        asked.append((evaluation.reference, evaluation.perplexity, evaluation.agreement))
        return real(evaluation)

    monkeypatch.setattr(quantized, "run_evaluation", seen)
    run_missing(list(cells(*own)))
    model = own[1][0]
    compared = [each for each in asked if each[0]]
    assert compared == [(model, False, 3)] * 3  # near, what is tuned, and what came of it
    found = {(e.row, e.measure): e.ours for e in entries(*own)}
    states = {(e.row, e.measure): e.state for e in entries(*own)}
    assert (found["original", "KL"], states["original", "KL"]) == (None, "none")
    assert min(found["near", "KL"], found["tuned", "KL"]) > 0
    assert 0 <= found["near", "same text"] <= 1
    asked.clear()
    run_missing(list(cells(*own)))
    assert not asked


def test_the_numbers_are_those_of_quip_evaluate(own, tmp_path):
    _table, models, settings, _root = own
    near = next(cell for cell in cells(*own) if cell.flags.get("quant") == "nearest")
    quantized._quantize(near, save=True)
    again = run_evaluation(
        Evaluation(
            model=str(near.checkpoint),
            reference=models[0],
            datasets=settings.evaluate,
            seqlen=16,
            nsamples=3,
        )
    )
    found = near.report()
    [text] = settings.evaluate
    assert found["compared"]["kl"] == again["divergence"][text]["kl"]
    assert found["mean_perplexity"] == again["perplexity"][text]
    assert not near.missing()


def test_what_cannot_be_compared_is_refused(tmp_path):
    for line, other in (("evaluate: [wikitext2]\n", ""), ("models:", "kind: saved\nmodels:")):
        (tmp_path / "mine.yaml").write_text(OWN.replace(line, other))
        with pytest.raises(UsageError, match="compared is of runs and of texts"):
            read_table(str(tmp_path / "mine.yaml"))


def test_what_was_measured_is_kept_where_the_comparison_fails(own, monkeypatch):
    def fails(evaluation: Evaluation):
        raise Unavailable("no memory")

    monkeypatch.setattr(quantized, "run_evaluation", fails)
    near = next(cell for cell in cells(*own) if cell.flags.get("quant") == "nearest")
    with pytest.raises(Unavailable, match="no memory"):
        quantized._quantize(near, save=False)
    assert near.report()["mean_perplexity"] > 0
    assert {measure.label for measure in near.missing()} == {"KL", "same text"}
