"""A run.json of another shape than a run writes: one line, and no number is lost unsaid."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quip.errors import Unavailable
from quip.jobs.evaluate import Evaluation, run_evaluation
from quip.jobs.experiment import Experiment
from quip.jobs.finetune import FineTuning, finetune_checkpoint
from quip.jobs.inspect import inspect_checkpoint, matrix_records
from quip.jobs.report.folder import read_report
from quip.jobs.run import run_experiment
from quip.matrix.build import build_recipe
from tests.support.runs import save_model, write_text

DAMAGE = {
    "5": "it is 5, not a mapping",
    "[]": r"it is \[\], not a mapping",
    "{": "Expecting property name",
    '{"seed": 1, "seed": 2}': "the key 'seed' stands there twice",
    '{"a": ' + "[" * 200_000: "lists or mappings more than 64 deep",
    '{"a": ' + "9" * 5000 + "}": "a number of 5000 digits",
    '{"fingerprint": []}': r"fingerprint is \[\], not a mapping or null",
    '{"perplexity": [1]}': r"perplexity is \[1\], not a mapping",
    '{"perplexity": {"a": "b"}}': "perplexity.a is 'b', not a number or one of nan, inf, -inf",
    '{"evaluation": {"a": {"dataset": "b"}}}': "evaluation.a.windows is missing",
    '{"tasks": {"a": 1}}': "tasks.a is 1, not a mapping",
    '{"seconds": {"load": true}}': "seconds.load is True, not a number",
    '{"matrices": [[]]}': r"matrices\[0\] is \[\], not a mapping",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Experiment, Path]:
    """A run that is complete, and the checkpoint that it saved."""
    folder = tmp_path_factory.mktemp("run")
    asked = Experiment(
        model=save_model(folder / "model"),
        dataset=write_text(folder / "train.txt"),
        recipe=build_recipe(quant="nearest", wbits=4),
        nsamples=4,
        seqlen=16,
        device="cpu",
        out=folder / "out",
        save=folder / "saved",
    )
    run_experiment(asked)
    return asked, folder / "saved"


@pytest.fixture
def report(finished):
    """Writes a run.json, and puts back what was there."""
    asked, saved = finished
    before = {path: path.read_text() for path in (asked.out / "run.json", saved / "run.json")}

    def write(folder: Path, text: str) -> None:
        (folder / "run.json").write_text(text)

    yield write
    for path, text in before.items():
        path.write_text(text)


@pytest.mark.parametrize(("text", "says"), DAMAGE.items(), ids=range(len(DAMAGE)))
def test_what_no_run_writes_is_damage_and_not_nothing(tmp_path: Path, text: str, says: str):
    assert read_report(tmp_path) == {}
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(Unavailable, match=rf"run.json is damaged \({says}") as error:
        read_report(tmp_path)
    assert str(error.value).endswith("); remove it if what it knows may be lost")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("where", ["out", "save"])
def test_a_damaged_report_stops_resume_instead_of_being_lost(finished, report: Callable, where):
    asked, _ = finished
    report(getattr(asked, where), '{"perplexity": {"a": "b"}}')
    resumed = Experiment(**{**vars(asked), "resume": True})
    with pytest.raises(Unavailable, match=r"run.json is damaged \(perplexity.a is 'b'"):
        run_experiment(resumed)


def test_a_damaged_report_stops_what_goes_by_it_and_costs_inspect_a_note(
    finished, report: Callable, tmp_path: Path
):
    _, saved = finished
    report(saved, "5")
    for use in (
        lambda: run_evaluation(Evaluation(model=str(saved))),
        lambda: finetune_checkpoint(
            FineTuning(checkpoint=saved, dataset="pydoc", save=tmp_path / "tuned")
        ),
        lambda: matrix_records(saved),
    ):
        with pytest.raises(Unavailable, match=r"run.json is damaged \(it is 5, not a mapping\)"):
            use()
    [note] = inspect_checkpoint(saved)["notes"]
    assert note.endswith("what only it knows is left out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": True}, "matrices[0].rows is True, not a whole number"),
        ({"name": ["a"]}, "matrices[0].name is ['a'], not text"),
        ({"proxy_loss": "much"}, "matrices[0].proxy_loss is 'much', not a number"),
    ],
)
def test_a_matrix_of_another_shape_is_named_with_its_key(finished, report, change, says):
    _, saved = finished
    words = json.loads((saved / "run.json").read_text())
    words["matrices"][0] |= change
    report(saved, json.dumps(words))
    with pytest.raises(Unavailable) as error:
        matrix_records(saved)
    assert f"run.json is damaged ({says}); remove it if" in str(error.value)
