"""Token weights and rescaled outputs from folder to folder: resumed, streamed, from a store."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quip.data.hessian_files import FELT
from quip.data.hessians import HessianStore
from quip.errors import UsageError
from quip.jobs import sensitivity
from quip.jobs import sensitivity as pass_job
from quip.jobs.experiment import Experiment
from quip.jobs.hessians import Collection, collect_hessians
from quip.jobs.run import run_experiment
from quip.matrix.build import build_recipe
from quip.model.ledger import Ledger
from quip.packed.checkpoint import load
from tests.support.runs import save_model, write_text

RESCALED = build_recipe(wbits=2, incoh_processing=True, pre_rescale_out=True)
PLAIN = build_recipe(wbits=2, incoh_processing=True)


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Experiment:
    """A run with all of it, that has been run."""
    place = tmp_path_factory.mktemp("opt")
    e = Experiment(
        model=save_model(place / "model"),
        dataset=write_text(place / "text.txt"),
        recipe=RESCALED,
        token_weights="fisher",
        nsamples=5,
        seqlen=16,
        stream="off",
        device="cpu",
        out=place / "out",
        save=place / "saved",
    )
    run_experiment(e)
    return e


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def matrices(report: dict[str, Any], *, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    left_out = dict.fromkeys(("seconds", *without))
    return [{**row, **left_out} for row in report["matrices"]]


def no_pass(*_: Any) -> None:
    raise AssertionError("the pass was made again")


def test_a_run_reports_both_losses_and_the_seconds_of_the_pass(asked):
    report = json.loads((asked.out / "run.json").read_text())
    assert report["seconds"]["sensitivity"] > 0
    assert all(row["plain_loss"] and row["damage"] for row in report["matrices"])
    assert report["totals"]["mean_plain_loss"] > 0
    assert report["fingerprint"]["token_weights"] == "fisher"
    assert not list(asked.out.rglob(FELT))  # nobody needs it any more
    load(asked.save)


def test_a_run_that_was_killed_does_not_repeat_the_pass(asked, tmp_path, monkeypatch):
    e = replace(asked, out=tmp_path / "out", save=tmp_path / "saved")
    keep = Ledger.keep

    def killed(ledger: Ledger, block: Any, *rest: Any) -> None:
        keep(ledger, block, *rest)
        if block.index == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(e)
    assert list(e.out.rglob(FELT))
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "measure_sensitivity", no_pass)
        report = run_experiment(replace(e, resume=True))
    assert weights(e.save) == weights(asked.save)
    assert matrices(report) == matrices(json.loads((asked.out / "run.json").read_text()))
    with pytest.raises(UsageError, match="token_weights"):
        run_experiment(replace(e, resume=True, token_weights="labels", save=None))


@pytest.mark.slow
def test_a_file_that_was_damaged_is_made_again(asked, tmp_path, monkeypatch, caplog):
    e = replace(asked, out=tmp_path / "out", save=tmp_path / "saved")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(e)
    (path,) = e.out.rglob(FELT)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    run_experiment(replace(e, resume=True))
    assert "the pass is repeated" in caplog.text
    assert weights(e.save) == weights(asked.save)


def test_a_streamed_model_feels_the_same(asked, tmp_path):
    e = replace(asked, out=tmp_path / "out", save=tmp_path / "saved", stream="on")
    run_experiment(e)
    assert load(e.save).state_dict().keys() == load(asked.save).state_dict().keys()
    ours, theirs = load(e.save).state_dict(), load(asked.save).state_dict()
    assert all(x.equal(theirs[name]) for name, x in ours.items())


def collected(asked: Experiment, save: Path, **options: Any) -> Path:
    request = Collection(
        model=asked.model,
        dataset=str(asked.dataset),
        save=save,
        nsamples=asked.nsamples,
        seqlen=asked.seqlen,
        device="cpu",
        **options,
    )
    collect_hessians(request)
    return save


def from_store(asked: Experiment, store: Path, **options: Any) -> dict[str, Any]:
    how = {"dataset": None, "hessians": store, "out": None, "save": None, **options}
    return run_experiment(replace(asked, **how))


def test_a_store_has_weighted_moments_and_what_outputs_feel(asked, tmp_path):
    weighted = collected(asked, tmp_path / "run", recipe=RESCALED, token_weights="fisher")
    store = HessianStore(weighted)
    assert store.token_weights == "fisher"
    assert not list(weighted.rglob(f"blocks/{FELT}"))
    found = from_store(asked, weighted, save=tmp_path / "saved")
    assert weights(tmp_path / "saved") == weights(asked.save)
    report = json.loads((asked.out / "run.json").read_text())
    assert matrices(found, without=("plain_loss",)) == matrices(report, without=("plain_loss",))
    plain = collected(asked, tmp_path / "plain")
    original = collected(asked, tmp_path / "original", token_weights="fisher")
    for name in ("plain", "original"):
        assert HessianStore(tmp_path / name).felt == (
            (original / FELT) if name == "original" else None
        )
    first = HessianStore(plain).inputs[0].name
    assert not HessianStore(plain).read(first).H.equal(HessianStore(original).read(first).H)


@pytest.mark.parametrize(
    ("stored", "wanted", "recipe", "message"),
    [
        ("none", "fisher", PLAIN, r"--token_weights fisher: .* are of --token_weights none; say"),
        ("fisher", "none", PLAIN, r"--token_weights none: .* are of --token_weights fisher; say"),
        ("fisher", "labels", PLAIN, r"--token_weights labels: .* are of --token_weights fisher"),
        ("none", "none", RESCALED, r"--pre_rescale_out: .* collect one that does: quip hessians"),
    ],
)
def test_a_store_of_other_weights_is_refused(asked, tmp_path, stored, wanted, recipe, message):
    store = collected(asked, tmp_path / "store", token_weights=stored)
    with pytest.raises(UsageError, match=message):
        from_store(asked, store, token_weights=wanted, recipe=recipe)


def test_outputs_are_rescaled_without_weights_of_tokens_too(asked, tmp_path, monkeypatch):
    e = replace(asked, out=tmp_path / "out", save=None, token_weights="none")
    report = run_experiment(e)
    assert report["seconds"]["sensitivity"] > 0
    assert all(row["plain_loss"] is row["damage"] is None for row in report["matrices"])
    with monkeypatch.context() as patch:
        patch.setattr(pass_job, "felt_for", no_pass)
        plain = run_experiment(replace(e, recipe=PLAIN, out=None))
    assert "sensitivity" not in plain["seconds"]
    assert "mean_plain_loss" not in plain["totals"]
