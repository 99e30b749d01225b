"""Whole runs on mixtures of every family, and on GPT-2's Conv1D, from folder to folder."""

import json
import os
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from quip.data.hessians import HessianStore
from quip.jobs.experiment import Experiment
from quip.jobs.hessians import Collection, collect_hessians
from quip.jobs.plan import read_plan
from quip.jobs.report import folder as report_folder
from quip.jobs.report import saved
from quip.jobs.run import run_experiment
from quip.matrix.build import build_recipe
from quip.model import siblings
from quip.model.plan import Plan, Rule
from tests.support.checkpoints import QUIP, SHARP, fresh
from tests.support.mixtures import MIXTURES, mixture
from tests.support.runs import write_text
from tests.support.tiny import VOCAB
from tests.support.tokenizer import save_tokenizer

FAMILIES = [*MIXTURES, "gpt2"]
OF_EXPERTS = Plan(rules=(Rule("*experts*", build_recipe(**SHARP)),), default=QUIP)
EVALUATE = """
import json, sys
from quip.jobs.report import folder as report_folder
from quip.jobs.report import saved
from quip.jobs.experiment import Experiment
from quip.jobs.run import run_experiment
text, *folders = sys.argv[1:]
print(json.dumps([
    run_experiment(Experiment(
        model="demo", dataset=text, recipe=None, load=folder, seqlen=16, device="cpu",
        eval_datasets=(text,), eval_nsamples=3,
    ))["perplexity"][text]
    for folder in folders
]))
"""


def save_family(name: str, folder: Path) -> str:
    if name == "gpt2":
        config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=VOCAB)
        model = hf.AutoModelForCausalLM.from_config(config)
    else:
        model = mixture(name)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Runs of the families, each when it is asked for: their experiments and reports."""
    folder = tmp_path_factory.mktemp("mixtures")
    patched = pytest.MonkeyPatch()
    for module in (report_folder, saved):
        patched.setattr(module, "write_plot", lambda *_: None)  # which takes longest
    text = write_text(folder / "text.txt")

    @cache
    def finished(name: str) -> tuple[Experiment, dict]:
        experiment = Experiment(
            model=save_family(name, folder / name),
            dataset=text,
            recipe=QUIP if name == "gpt2" else OF_EXPERTS,
            nsamples=4,
            seqlen=16,
            device="cpu",
            eval_datasets=(text,),
            eval_nsamples=3,
            save=folder / f"{name}-2bit",
        )
        return experiment, run_experiment(experiment)

    yield SimpleNamespace(finished=finished, text=text)
    patched.undo()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_quantized_by_a_plan_that_names_its_experts(work, name):
    _, report = work.finished(name)
    assert report["status"] == "complete"
    of_experts = [row for row in report["matrices"] if row["tokens"] is not None]
    assert len(of_experts) == (0 if name == "gpt2" else 2 * 4 * (1 + (name != "nemotron-h")))
    assert all(".experts." in row["name"] for row in of_experts)
    if of_experts:
        experts = report["totals"]["experts"]
        assert experts["matrices"] == len(of_experts)
        assert experts["short"] == sum(row["tokens"] < row["columns"] for row in of_experts) > 0
        assert min(row["tokens"] for row in of_experts) == experts["fewest_tokens"]


@pytest.mark.slow
def test_a_fresh_process_finds_what_was_saved(work):
    runs = {name: work.finished(name) for name in FAMILIES}
    folders = [experiment.save for experiment, _ in runs.values()]
    found = dict(zip(runs, fresh(EVALUATE, work.text, *folders), strict=True))
    assert found == {name: report["perplexity"][work.text] for name, (_, report) in runs.items()}


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_run_killed_among_experts_ends_bitwise_as_one_that_was_not(
    work, name, tmp_path, monkeypatch
):
    experiment, _ = work.finished(name)
    again = replace(experiment, out=tmp_path / "run", save=tmp_path / "saved", resume=True)
    real, records = siblings._record, []

    def sometimes(*args, **known):
        records.append(args[0])
        if len(records) > 18:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **known)

    child = os.fork()
    if child == 0:
        try:
            siblings._record = sometimes
            run_experiment(again)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (tmp_path / "run" / "blocks" / "block-0000.safetensors").exists()
    run_experiment(again)
    found, expected = (
        load_file(folder / "model.safetensors") for folder in (again.save, experiment.save)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[key]) for key, x in found.items())


@pytest.mark.parametrize("all_experts", [False, True])
def test_a_store_of_experts_gives_the_codes_of_the_run_that_filled_it(work, all_experts, tmp_path):
    experiment, _ = work.finished("qwen3-moe")
    asked = replace(experiment, all_experts=all_experts, eval_datasets=(), out=None, recipe=QUIP)
    collect_hessians(
        Collection(
            model=asked.model,
            dataset=asked.dataset,
            save=tmp_path / "store",
            recipe=QUIP,
            nsamples=4,
            seqlen=16,
            device="cpu",
            all_experts=all_experts,
        )
    )
    store = HessianStore(tmp_path / "store")
    assert store.manifest.get("all_experts", False) == all_experts
    direct = run_experiment(replace(asked, save=tmp_path / "direct"))
    stored = run_experiment(
        replace(
            asked,
            dataset=None,
            all_experts=False,
            hessians=tmp_path / "store",
            save=tmp_path / "stored",
        )
    )
    tokens = [{row["name"]: row["tokens"] for row in x["matrices"]} for x in (direct, stored)]
    assert tokens[0] == tokens[1]
    found = [load_file(tmp_path / x / "model.safetensors") for x in ("direct", "stored")]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(x, found[1][key]) for key, x in found[0].items())


def test_losses_and_statistics_of_experts_come_from_a_store(work, quip, tmp_path):
    experiment, _ = work.finished("qwen3-moe")
    store, model = tmp_path / "store", experiment.model
    text = ["--nsamples", 4, "--seqlen", 16]
    status, _, err = quip("hessians", model, work.text, "--save", store, *text)
    assert status == 0, err
    losses = ["--quant", "nearest", "--wbits", 4, "--layers", "experts.*.down_proj"]
    status, out, err = quip("proxy", model, store, *losses)
    assert (status, "over 8 matrices" in out) == (0, True), err
    status, out, err = quip("summary", store, "--model", model, "--json")
    assert status == 0, err
    rows = json.loads(out)["inputs"]
    counts = {row["name"]: row["tokens"] for row in rows if ".experts." in row["name"]}
    assert len(counts) == 2 * 4 * 2
    assert sum(n for name, n in counts.items() if "layers.0" in name) == 2 * 2 * 4 * 16


def test_the_command_says_how_many_tokens_experts_saw(work, quip, tmp_path):
    experiment, _ = work.finished("olmoe")
    (tmp_path / "plan.yaml").write_text('"*experts*": {wbits: 3}\n')
    where = ["--save", tmp_path / "saved", "--eval_datasets", "none"]
    line = ["run", experiment.model, work.text, "--nsamples", 4, "--seqlen", 16, "--wbits", 4]
    status, out, err = quip(*line, *where, "--plan", tmp_path / "plan.yaml", "--all_experts")
    assert status == 0, err
    assert "experts saw " in out
    assert not any("saw fewer" in each for each in err)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| tokens that experts saw | " in card
    assert "--all_experts" in card
    rows = json.loads((tmp_path / "saved" / "run.json").read_text())["matrices"]
    bits = {".experts." in row["name"]: int(row["bits_per_weight"]) for row in rows}
    assert bits[True] < bits[False]


def test_experts_of_a_block_are_planned_as_one(work, quip, tmp_path):
    experiment, _ = work.finished("olmoe")
    plan, asked = tmp_path / "plan.yaml", ("--nsamples", 4, "--seqlen", 16, "--bits", 5.6)
    line = ["plan", experiment.model, work.text, *asked, "--codebook", "int", "--incoh_processing"]
    status, _, err = quip(*line, "--out", plan)
    assert status == 0, err
    recipes = read_plan(plan)
    assert "*" in recipes
    named = [pattern for pattern in recipes if ".experts." in pattern]
    assert named
    assert all(".experts.*." in pattern for pattern in named)
    run = ("--nsamples", 4, "--seqlen", 16, "--eval_datasets", "none", "--plan", plan)
    status, _, err = quip("run", experiment.model, work.text, *run)
    assert status == 0, err


def test_all_experts_speaks_of_calibration(quip, tmp_path):
    status, _, err = quip("run", "demo", "--hessians", tmp_path, "--wbits", 2, "--all_experts")
    assert status == 2
    assert "--all_experts speaks of calibration" in err[-1]
