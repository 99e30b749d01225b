"""Whole runs on tiny models and texts: what is checked first, written down, and kept."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quip.errors import (
    NonFinite,
    NotPositiveDefinite,
    QuipError,
    Unavailable,
    UnsupportedModel,
    UsageError,
)
from quip.evaluate.zeroshot import ZeroShot
from quip.jobs import evaluate, run
from quip.jobs.experiment import Experiment
from quip.jobs.run import run_experiment
from quip.matrix.build import build_recipe
from quip.model.device import choose_device
from quip.model.load import load_model
from quip.model.matrices import check_quantizable
from tests.support.runs import save_model, write_text

RECIPE = build_recipe(quant="ldlq", wbits=2, incoh_processing=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "opt")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    return {name: write_text(folder / f"{name}.txt") for name in ("train", "test", "other")}


@pytest.fixture
def plan(model, texts):
    """plan(**changes): an Experiment that takes a second."""

    def make(**changes) -> Experiment:
        defaults = {
            "model": model,
            "dataset": texts["train"],
            "recipe": RECIPE,
            "nsamples": 8,
            "seqlen": 16,
            "device": "cpu",
            "eval_datasets": (texts["test"], texts["other"]),
            "eval_nsamples": 3,
        }
        return Experiment(**{**defaults, **changes})

    return make


def written(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_the_report_holds_all_that_a_number_depends_on(plan, texts, tmp_path):
    flags = {"wbits": 2, "out": tmp_path / "run"}
    report = run_experiment(
        plan(compare=True, out=tmp_path / "run", flags=flags, method="ldlq, 2 bits", seed=3)
    )
    found = written(tmp_path / "run")
    assert found == json.loads(json.dumps(report, default=str))  # what is returned is on disk
    assert found["status"] == "complete"
    assert found["flags"] == {"wbits": 2, "out": str(tmp_path / "run")}
    assert found["recipe"]["feedback"] == "ldl"
    assert found["recipe"]["codebook"]["bits"] == 2
    assert (found["seed"], found["device"], found["dtype"]) == (3, "cpu", "float32")
    assert {"python", "torch", "transformers"} <= found["versions"].keys()
    stamp = found["calibration"]
    assert (stamp["dataset"], stamp["windows"], stamp["seqlen"]) == (texts["train"], 8, 16)
    for name in (texts["test"], texts["other"]):
        stamp = found["evaluation"][name]
        assert (stamp["split"], stamp["join"], stamp["windows"]) == ("whole", "\n\n", 3)
        assert len(stamp["sha256"]) == 64
        assert found["perplexity"][name] > 1
        assert found["original_perplexity"][name] != found["perplexity"][name]
    assert len(found["matrices"]) == found["totals"]["matrices"] == 24
    for key in ("name", "rows", "columns", "proxy_loss", "damp", "bits_per_weight", "seconds"):
        assert key in found["matrices"][0]
    assert "lm_head" in found["kept_matrices"]
    assert list(found["seconds"]) == [
        *("load", "data", "evaluate", "replay", "observe", "quantize", "keep"),
    ]
    assert found["peak_memory"]["host_gb"] > 0.1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "layers.csv", "layers.png", "blocks"}


def test_the_same_experiment_gives_the_same_numbers(plan):
    first, again = (run_experiment(plan()) for _ in range(2))
    assert first["perplexity"] == again["perplexity"]
    assert first["calibration"] == again["calibration"]
    other = run_experiment(plan(seed=1))
    assert other["calibration"]["sha256"] != first["calibration"]["sha256"]
    assert other["evaluation"] == first["evaluation"]


def test_without_a_recipe_the_model_is_evaluated_as_it_is(plan, tmp_path):
    report = run_experiment(plan(recipe=None, compare=True, out=tmp_path / "run"))
    quantized = run_experiment(plan(compare=True))
    assert report["perplexity"] == quantized["original_perplexity"]
    assert report["recipe"] is report["calibration"] is None
    assert not {"matrices", "original_perplexity"} & report.keys()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_windows_are_as_long_as_the_model_takes_unless_said(plan, texts, tmp_path):
    report = run_experiment(plan(seqlen=None, eval_datasets=(texts["test"],)))
    assert report["evaluation"][texts["test"]]["seqlen"] == 32


def test_the_report_is_written_before_evaluation_starts_and_completed_after(
    plan, texts, tmp_path, monkeypatch
):
    seen, real = [], evaluate.perplexity

    def watched(*args, **options) -> float:
        seen.append(written(tmp_path))
        return real(*args, **options)

    monkeypatch.setattr(evaluate, "perplexity", watched)
    run_experiment(plan(compare=True, out=tmp_path))
    assert [found["status"] for found in seen] == [
        "started",
        "evaluating",
        "quantized",
        "evaluating",
    ]
    assert [len(found.get("perplexity", {})) for found in seen] == [0, 0, 0, 1]
    assert [len(found.get("original_perplexity", {})) for found in seen] == [0, 1, 2, 2]
    assert all(len(found["matrices"]) == 24 for found in seen[2:])


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_an_evaluation_that_fails_loses_nothing_before_it(plan, tmp_path, monkeypatch, error):
    def fail(*args, **options) -> float:
        raise error

    monkeypatch.setattr(evaluate, "perplexity", fail)
    with pytest.raises(type(error)):
        run_experiment(plan(out=tmp_path))
    found = written(tmp_path)
    assert found["status"] == "failed"
    assert found["error"] == f"{type(error).__name__}: {error}"
    assert len(found["matrices"]) == 24
    assert (tmp_path / "layers.csv").exists()


def test_activations_that_overflow_are_named_and_the_matrices_before_are_kept(plan, tmp_path):
    name = "model.decoder.layers.1"
    broken = save_model(
        tmp_path / "model", **{f"{name}.fc1.bias": 3e38, f"{name}.fc1.weight": 1e38}
    )
    with pytest.raises(NonFinite, match=rf"{name}.fc2: NaN or infinity among its inputs"):
        run_experiment(plan(model=broken, out=tmp_path / "run"))
    found = written(tmp_path / "run")
    assert found["status"] == "failed"
    assert found["error"].startswith(f"NonFinite: {name}.fc2")
    assert {matrix["block"] for matrix in found["matrices"]} == {0}


def test_weights_that_are_not_finite_are_named_before_anything_runs(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "calibration_of", never)
    broken = save_model(tmp_path / "model", model__decoder__layers__2__fc1__weight=math.nan)
    with pytest.raises(NonFinite, match=r"model.decoder.layers.2.fc1.weight: NaN or infinity"):
        run_experiment(plan(model=broken, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_hessian_that_no_damping_helps_is_named(plan, monkeypatch):
    why = NotPositiveDefinite("the smallest eigenvalue is -1.00e+00")
    monkeypatch.setattr("quip.matrix.linalg._is_factor", lambda *_: False)
    monkeypatch.setattr("quip.matrix.linalg._failure", lambda H: why)
    line = (
        r"layers.0.self_attn.\w_proj: .*-1.00e\+00 after damping by 10 of .*--nsamples.*--percdamp"
    )
    with pytest.raises(NotPositiveDefinite, match=line):
        run_experiment(plan())


def test_a_perplexity_that_is_not_finite_fails_and_loses_nothing(
    plan, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "perplexity", lambda *args, **options: math.nan)
    asked = plan(out=tmp_path / "run", save=tmp_path / "saved")
    with pytest.raises(NonFinite, match=r"perplexity on .*test.txt is nan"):
        run_experiment(asked)
    found = written(tmp_path / "run")
    assert found["status"] == "failed"
    assert found["error"].startswith("NonFinite: perplexity on")
    assert len(found["matrices"]) == 24
    assert load_model(str(tmp_path / "saved"))
    monkeypatch.undo()
    report = run_experiment(replace(asked, resume=True))
    assert math.isfinite(report["perplexity"][texts["test"]])


def test_what_tasks_need_is_fetched_before_anything_is_quantized(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "quantize_matrix_by_matrix", never)

    def unreachable(*args: object) -> None:
        raise Unavailable("piqa: its data set cannot be loaded")

    monkeypatch.setattr("quip.jobs.tasks.fetch_tasks", unreachable)
    asked = plan(out=tmp_path / "run", tasks=ZeroShot(tasks=("quip_demo_cloze",)))
    with pytest.raises(Unavailable, match="piqa"):
        run_experiment(asked)
    assert written(tmp_path / "run")["status"] == "failed"


def never(*args: object, **options: object) -> None:
    raise AssertionError("this is work that should not have been started")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dataset": "wikitxt2"}, "unknown data set 'wikitxt2'"),
        ({"eval_datasets": ("pydoc", "nowhere.txt")}, "unknown data set 'nowhere.txt'"),
        ({"dataset": __file__}, "not a file that can be read"),
        ({"device": "zork"}, "--device zork: no such kind of device"),
        ({"out": Path(__file__)}, "it is a file"),
        ({"out": Path(__file__).parent}, "not empty"),
    ],
)
def test_what_can_be_known_without_the_model_is_refused_before_it_is_loaded(
    plan, monkeypatch, changes, line
):
    monkeypatch.setattr(run, "load_model", never)
    with pytest.raises(UsageError, match=line):
        run_experiment(plan(**changes))


def test_a_damaged_file_of_text_is_refused_before_the_model_is_loaded(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_model", never)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text"')
    with pytest.raises(QuipError, match=r"a.jsonl: line 2 is not JSON"):
        run_experiment(plan(eval_datasets=(str(path),)))


def test_a_seqlen_above_the_positions_is_refused_before_weights_are_read(plan, monkeypatch):
    monkeypatch.setattr("quip.model.load._weights", never)
    with pytest.raises(UsageError, match=r"seqlen 33 is above the 32 positions"):
        run_experiment(plan(seqlen=33))


@pytest.mark.parametrize(
    "changes", [{"nsamples": 1000}, {"model": "./nowhere/at-all"}, {"seqlen": 64}]
)
def test_a_run_that_is_refused_leaves_no_folder(plan, tmp_path, changes):
    with pytest.raises(QuipError):
        run_experiment(plan(out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_model_whose_blocks_hold_no_matrix_is_unsupported(model):
    loaded = load_model(model)
    loaded.model.model.decoder.layers = torch.nn.ModuleList([torch.nn.LayerNorm(4)] * 2)
    with pytest.raises(UnsupportedModel, match=r"no nn\.Linear to quantize"):
        check_quantizable(loaded.model, loaded.name)


def test_devices_that_cannot_compute_are_refused_in_one_line():
    assert choose_device("cpu") == "cpu"
    assert choose_device(None) in ("cpu", "cuda")
    for name in ("zork", "meta", "cpu:x", "cuda:99"):
        with pytest.raises(
            UsageError, match=rf"--device {name}: .*; say cpu, or leave it out"
        ) as e:
            choose_device(name)
        assert len(str(e.value)) < 160
        assert "\n" not in str(e.value)
