"""Evaluating what was saved: the same numbers as in the run, and beside the original."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from quip import cli
from quip.errors import NonFinite, UnsupportedModel, UsageError
from quip.evaluate.speed import Speed
from quip.evaluate.zeroshot import ZeroShot
from quip.jobs import evaluate, run, speed, tasks
from quip.jobs.evaluate import Evaluation, run_evaluation
from quip.jobs.experiment import Experiment
from quip.jobs.report.text import table
from quip.jobs.run import run_experiment
from quip.matrix.build import build_recipe
from quip.model.load import load_model
from quip.packed.linear import quantized_layers
from tests.support.runs import save_model, write_text

RECIPE = build_recipe(quant="ldlq", wbits=3, incoh_processing=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model, two texts, and the checkpoint and report of a run with them."""
    folder = tmp_path_factory.mktemp("made")
    model = save_model(folder / "opt", positions=600)
    train, test = (write_text(folder / f"{name}.txt") for name in ("train", "test"))
    experiment = Experiment(
        model=model,
        dataset=train,
        recipe=RECIPE,
        method="ldlq, 3 bits",
        nsamples=8,
        seqlen=16,
        device="cpu",
        eval_datasets=(test,),
        eval_nsamples=5,
        compare=True,
        save=folder / "saved",
    )
    return experiment, run_experiment(experiment)


def test_a_checkpoint_has_the_perplexity_of_the_run_that_saved_it(made):
    experiment, run = made
    report = run_evaluation(Evaluation(model=str(experiment.save), device="cpu"))
    assert report["perplexity"] == run["perplexity"]
    assert report["evaluation"] == run["evaluation"]  # data, windows and length too
    assert report["method"] == "ldlq, 3 bits"
    assert (report["dtype"], report["status"]) == ("float32", "complete")


def test_streamed_a_checkpoint_and_its_original_measure_the_same(made):
    experiment, _ = made
    asked = Evaluation(model=str(experiment.save), reference=experiment.model, device="cpu")
    whole, streamed = (run_evaluation(replace(asked, stream=mode)) for mode in ("off", "on"))
    for key in ("perplexity", "original_perplexity", "divergence"):
        assert streamed[key] == whole[key]


@pytest.mark.parametrize(
    "measure",
    [{"speed": True}, {"tasks": ZeroShot(tasks=("quip_demo_cloze",))}, {"agreement": 2}],
)
def test_what_needs_the_whole_model_is_refused_of_one_that_is_streamed(made, measure):
    experiment, _ = made
    asked = Evaluation(model=str(experiment.save), device="cpu", stream="on", **measure)
    with pytest.raises(UsageError, match="--stream off"):
        run_evaluation(asked)


def test_what_is_asked_for_wins_over_what_the_run_measured(made, tmp_path):
    experiment, _ = made
    other = write_text(tmp_path / "other.txt")
    asked = Evaluation(
        model=str(experiment.save), datasets=(other,), seqlen=12, nsamples=2, device="cpu"
    )
    (stamp,) = run_evaluation(asked)["evaluation"].values()
    assert (stamp["dataset"], stamp["seqlen"], stamp["windows"]) == (other, 12, 2)


def test_the_original_is_measured_beside_it(made, tmp_path):
    experiment, run = made
    (name,) = experiment.eval_datasets
    report = run_evaluation(
        Evaluation(
            model=str(experiment.save),
            reference=experiment.model,
            agreement=4,
            device="cpu",
            out=tmp_path / "r",
        )
    )
    assert report["original_perplexity"] == run["original_perplexity"]
    assert report["perplexity"] == run["perplexity"]
    moved = report["divergence"][name]
    assert moved["kl"] > 0
    assert 0 < moved["top1_agreement"] < 1
    itself = run_evaluation(
        Evaluation(
            model=experiment.model,
            datasets=(name,),
            seqlen=16,
            nsamples=5,
            reference=experiment.model,
            agreement=4,
            device="cpu",
        )
    )
    assert itself["divergence"][name]["kl"] == pytest.approx(0, abs=1e-6)
    assert itself["divergence"][name]["top1_agreement"] == 1
    texts = {"prompts": 4, "prompt_tokens": 16, "new_tokens": 32}
    assert itself["agreement"][name] == {"prefix": 1, "whole": 1, **texts}
    assert report["agreement"][name].items() >= texts.items()
    assert report["agreement"][name]["prefix"] < 1
    written = json.loads((tmp_path / "r" / "run.json").read_text())
    for key in ("divergence", "agreement"):
        assert written[key] == report[key]
    assert "99% of them at most" in table(report)
    assert "after 4 prompts agree in the first" in table(report)


@pytest.mark.slow
def test_speed_is_measured_packed_and_dense(made):
    experiment, _ = made
    report = run_evaluation(Evaluation(model=str(experiment.save), speed=True, device="cpu"))
    assert list(report["speed"]) == ["packed", "dense"]
    assert report["evaluation"] == {}  # nothing else was asked for
    for one in report["speed"].values():
        assert one["prefill_tokens_per_second"] > 0
        assert one["decode_tokens_per_second"] > 0
    # A table, not a measurement: at this size rotations take more than what codes save.
    assert "tokens per second" in table(report)
    assert table(report).count("of dense") == 1
    plain = run_evaluation(Evaluation(model=experiment.model, speed=True, device="cpu"))
    assert list(plain["speed"]) == ["dense"]


def test_speed_of_more_texts_is_measured_beside_that_of_one(made, monkeypatch):
    def timed(model, *, device, batch, prompt_tokens, new_tokens):
        counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch}
        rate = batch * (3.0 if quantized_layers(model) else 2.0)
        return Speed(
            prefill_tokens_per_second=10.0 * rate,
            decode_tokens_per_second=rate,
            repeats=1,
            model_bytes=1,
            peak_bytes=2,
            peak_since_process_start=False,
            graph=False,
            read_bytes=1,
            copy_bytes_per_second=100.0,
            bandwidth_share=rate / 100,
            **counts,
        )

    monkeypatch.setattr(speed, "speed", timed)
    report = run_evaluation(
        Evaluation(model=str(made[0].save), speed=True, speed_batch=(4, 1), device="cpu")
    )
    assert list(report["speed"]) == ["packed", "packed, 4 texts", "dense", "dense, 4 texts"]
    assert [one["batch"] for one in report["speed"].values()] == [1, 4, 1, 4]
    lines = table(report).splitlines()
    assert sum(line.endswith("decodes at 1.50 of dense") for line in lines) == 2


def test_tasks_run_on_a_checkpoint_and_in_a_run(made, tmp_path, monkeypatch):
    experiment, _ = made
    asked = ZeroShot(tasks=("quip_demo_cloze",), limit=4)
    report = run_evaluation(
        Evaluation(model=str(experiment.save), tasks=asked, batch_size=2, device="cpu")
    )
    scores = report["tasks"]["quip_demo_cloze"]
    assert 0 <= scores["acc"] <= 1
    assert scores["samples"] == 4
    assert "quip_demo_cloze" in table(report)
    options = {
        **{field: getattr(experiment, field) for field in experiment.__dataclass_fields__},
        "recipe": None,
        "load": str(experiment.save),
        "save": None,
        "tasks": asked,
        "batch_size": 2,
        "out": tmp_path / "run",
        "compare": False,
        "eval_datasets": (),
    }
    assert run_experiment(Experiment(**options))["tasks"]["quip_demo_cloze"] == scores

    def never(*args: object, **options: object) -> None:
        raise AssertionError("these scores are known")

    monkeypatch.setattr(tasks, "zeroshot", never)
    (tmp_path / "run" / "blocks").mkdir()  # as a run that quantizes leaves it
    again = run_experiment(Experiment(**{**options, "resume": True}))
    assert again["tasks"]["quip_demo_cloze"] == scores


def test_a_model_without_a_first_token_is_refused_before_the_work(made, tmp_path, monkeypatch):
    experiment, _ = made
    folder = shutil.copytree(experiment.model, tmp_path / "opt")
    config = json.loads((folder / "config.json").read_text())
    nothing = {"bos_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config | nothing))
    (folder / "generation_config.json").unlink(missing_ok=True)
    monkeypatch.setattr(evaluate, "measure_perplexities", None)  # these come after the refusal
    monkeypatch.setattr(run, "_quantize", None)
    asked = {"model": str(folder), "tasks": ZeroShot(tasks=("quip_demo_cloze",)), "device": "cpu"}
    with pytest.raises(UsageError, match="names a first or last token; add bos_token"):
        run_evaluation(Evaluation(**asked))
    with pytest.raises(UsageError, match="names a first or last token; add bos_token"):
        run_experiment(replace(experiment, **asked, save=None, out=None))


def test_a_group_of_tasks_has_a_row_for_each_and_is_known_when_taken_up(
    made, tmp_path, monkeypatch
):
    experiment, _ = made
    rows = {"one": {"acc": 0.5, "samples": 2}, "two": {"perplexity": 3.5, "samples": 2}}
    monkeypatch.setattr(evaluate, "check_tasks", lambda asked: None)
    monkeypatch.setattr(tasks, "fetch_tasks", lambda *args: [])
    monkeypatch.setattr(tasks, "zeroshot", lambda *args, **options: rows)
    options = {name: getattr(experiment, name) for name in experiment.__dataclass_fields__}
    options |= {"save": None, "compare": False, "eval_datasets": (), "out": tmp_path / "run"}
    asked = ZeroShot(tasks=("both",))
    assert run_experiment(Experiment(**{**options, "tasks": asked}))["tasks"] == rows

    def never(*args: object, **options: object) -> None:
        raise AssertionError("these scores are known")

    monkeypatch.setattr(tasks, "zeroshot", never)
    options |= {"resume": True}
    assert run_experiment(Experiment(**{**options, "tasks": asked}))["tasks"] == rows
    with pytest.raises(AssertionError, match="known"):
        run_experiment(Experiment(**{**options, "tasks": ZeroShot(tasks=("both",), limit=3)}))


def test_a_score_that_is_not_finite_is_an_error_once_it_is_written_down(
    made, tmp_path, monkeypatch
):
    experiment, _ = made
    rows = {"one": {"acc": 0.5, "acc_stderr": math.nan, "perplexity": math.inf, "samples": 1}}
    monkeypatch.setattr(evaluate, "check_tasks", lambda asked: None)
    monkeypatch.setattr(tasks, "fetch_tasks", lambda *args: [])
    monkeypatch.setattr(tasks, "zeroshot", lambda *args, **options: rows)
    asked = Evaluation(
        model=experiment.model, tasks=ZeroShot(tasks=("one",)), device="cpu", out=tmp_path / "out"
    )
    with pytest.raises(NonFinite, match=r"^one: perplexity is inf"):
        run_evaluation(asked)
    found = json.loads((tmp_path / "out" / "run.json").read_text())
    assert found["tasks"]["one"]["acc"] == 0.5
    assert found["status"] == "failed"


def test_overwrite_replaces_checkpoints_only_and_never_our_inputs(made, tmp_path):
    experiment, _ = made
    options = {name: getattr(experiment, name) for name in experiment.__dataclass_fields__}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"replaces checkpoints of quip only, and this folder"):
        run_experiment(Experiment(**{**options, "save": tmp_path / "mine", "overwrite": True}))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    saved = Path(shutil.copytree(experiment.save, tmp_path / "saved"))
    inside = {"dataset": write_text(saved / "train.txt"), "save": saved, "overwrite": True}
    with pytest.raises(UsageError, match=r"train.txt is in it, and would be lost"):
        run_experiment(Experiment(**{**options, **inside}))
    (saved / "train.txt").unlink()
    (saved / "model.safetensors").write_bytes(b"damaged")
    run_experiment(Experiment(**{**options, "save": saved, "overwrite": True}))
    assert load_model(str(saved))


def test_load_evaluates_a_checkpoint_in_place_of_the_model(made):
    experiment, run = made
    options = {name: getattr(experiment, name) for name in experiment.__dataclass_fields__}
    report = run_experiment(
        Experiment(**{**options, "recipe": None, "save": None, "load": str(experiment.save)})
    )
    assert report["perplexity"] == run["perplexity"]
    assert report["original_perplexity"] == run["original_perplexity"]


def test_a_checkpoint_cannot_be_quantized_again(made):
    experiment, _ = made
    options = {name: getattr(experiment, name) for name in experiment.__dataclass_fields__}
    with pytest.raises(UnsupportedModel, match=r"quantized already; give the original, or leave"):
        run_experiment(Experiment(**{**options, "model": str(experiment.save), "save": None}))


def test_a_model_without_a_run_needs_to_be_told_what_to_measure(made):
    experiment, _ = made
    with pytest.raises(UsageError, match=r"say where to measure with --datasets"):
        run_evaluation(Evaluation(model=experiment.model, device="cpu"))


def test_a_checkpoint_is_loaded_packed_and_in_the_dtype_of_its_run(made):
    experiment, _ = made
    loaded = load_model(str(experiment.save))
    assert str(loaded.model.dtype) == "torch.float32"
    assert "QuantizedLinear" in str(loaded.model)
    narrow = load_model(str(experiment.save), dtype="bfloat16")
    assert str(narrow.model.dtype) == "torch.bfloat16"


# The command line

AT_ONCE = [
    ("evaluate SAVED --num_fewshot 2", "--num_fewshot speaks of zero-shot tasks: name some with"),
    ("evaluate SAVED --limit 2", "--limit speaks of zero-shot tasks"),
    ("evaluate SAVED --tasks , ", "--tasks ',': name one or more"),
    ("evaluate SAVED --tasks storycloze", "--storycloze_csv"),
    ("evaluate SAVED --tasks quip_demo_cloz", "did you mean quip_demo_cloze"),
    ("evaluate SAVED --datasets ,", "--datasets ',': name one or more"),
    ("evaluate SAVED --seqlen 1", "--seqlen 1: at least 2 is needed"),
    ("evaluate SAVED --batch_size 0", "--batch_size 0: at least 1 is needed"),
    ("evaluate SAVED --speed_batch 4", "--speed_batch speaks of --speed: add it"),
    ("evaluate SAVED --speed --speed_batch 0", "--speed_batch: '0' is no whole number from 1"),
    ("evaluate SAVED --overwrite", "--overwrite speaks of --out"),
    ("run demo pydoc --save x", "--save needs weights to quantize: give --wbits 2 to 8"),
    ("run demo pydoc --wbits 2 --resume", "--resume takes up the run in --out"),
    ("run demo pydoc --wbits 2 --out x --resume --overwrite", "leave one out"),
    ("run demo pydoc --wbits 2 --load SAVED", "quantized already: leave out --wbits"),
    (
        "run demo pydoc --wbits 2 --out x --save x",
        "x, which is written as a whole; name two folders",
    ),
    ("run demo pydoc --wbits 2 --out x/run --save x", "--out x/run is in --save"),
    ("run demo pydoc --wbits 2 --save SAVED", "it exists and is not empty"),
    ("run demo pydoc --wbits 2 --proxy_only --tasks piqa", "--proxy_only evaluates nothing"),
]


@pytest.mark.parametrize(("line", "reason"), AT_ONCE)
@pytest.mark.usefixtures("command")
def test_a_wrong_request_is_one_line_before_a_model_is_loaded(
    made, capsys, tmp_path, monkeypatch, line, reason
):
    def never(*args: object, **options: object) -> None:
        raise AssertionError("this is work that should not have been started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quip.jobs.evaluate.load_model", never)
    monkeypatch.setattr("quip.jobs.run.load_model", never)
    words = line.replace("SAVED", str(made[0].save)).split()
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert reason in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("command")
def test_the_command_prints_what_it_measured(made, capsys):
    experiment, run = made
    assert cli.main(["evaluate", str(experiment.save), "--device", "cpu"]) == 0
    out, _ = capsys.readouterr()
    (value,) = run["perplexity"].values()
    assert f"{value:.4g}" in out
    assert Path(experiment.eval_datasets[0]).name in out


def test_agreement_without_an_original_is_refused_at_once(quip):
    status, _, err = quip("evaluate", "demo", "--datasets", "pydoc", "--agreement", "4")
    assert status == 2
    assert "--agreement speaks of the original: name it with --reference MODEL" in err[-1]
