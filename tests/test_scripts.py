"""The command lines of the QuIP paper's README, each with a tiny model in place of its own."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from quip.jobs import run
from quip.jobs.experiment import Experiment
from tests.support.runs import save_model, write_text

SCRIPTS = Path(__file__).parent.parent / "scripts"
DOORS = (
    *("opt.py", "llama.py", "main.py", "opt_saveH.py", "opt_proxy.py", "compute_Hsummary.py"),
    *("optq_counter.py", "optq_ldlq_equiv.py"),
)
GPTVQ_TABLES = ("bigtable", "target_bitwidth", "scaling", "m_step", "kmeans_init")
GPTVQ_TABLES += ("hessian_weighting",)
GPTVQ = (*(f"gptvq/{name}.py" for name in GPTVQ_TABLES), "gptvq/non_unif_no_opt.py")
EVALUATED = ("--eval_datasets", "text.txt", "--eval_nsamples", "2")
SMALL = ("--nsamples", "2", "--seqlen", "12", "--device", "cpu")


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with the models opt and llama and a text."""
    folder = tmp_path_factory.mktemp("here")
    for name in ("opt", "llama"):
        save_model(folder / name, name)
    write_text(folder / "text.txt")
    return folder


@pytest.fixture
def script(command, capsys, monkeypatch, here):
    """script(name, words) -> status, output and lines of stderr."""

    def call(name: str, *words: object) -> tuple[int, str, list[str]]:
        monkeypatch.chdir(here)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        out, err = capsys.readouterr()
        return left.value.code, out, err.splitlines()

    return call


@pytest.mark.parametrize("name", [*DOORS, *GPTVQ])
def test_every_door_is_thin_and_refuses_what_it_does_not_know_in_one_line(script, name):
    assert len((SCRIPTS / name).read_text().splitlines()) < 40
    needed = {
        "opt_proxy.py": ["pydoc"],
        "optq_counter.py": [],
        "optq_ldlq_equiv.py": [],
        "compute_Hsummary.py": ["--dirname", "a", "--savename", "b"],
        "main.py": ["opt", "c4", "--task", "arc_easy"],
        "opt_saveH.py": ["opt", "c4", "--save", "a"],
        **{f"gptvq/{table}.py": [] for table in GPTVQ_TABLES},
    }
    status, out, err = script(name, *needed.get(name, ["opt", "c4"]), "--slow")
    assert (status, out, len(err)) == (2, "", 1)
    assert "unrecognized arguments: --slow" in err[0]


def test_opt_evaluates_a_model_as_it_is(script):
    status, out, err = script("opt.py", "opt", "text.txt", *EVALUATED, *SMALL)
    assert status == 0, err
    assert "text.txt" in out


@pytest.mark.parametrize(
    ("name", "model", "flags"),
    [
        ("opt.py", "opt", "--wbits 4 --quant ldlq --incoh_processing"),
        ("opt.py", "opt", "--wbits 4 --quant gptq --pre_gptqH"),
        ("llama.py", "llama", "--wbits 2 --quant ldlq --incoh_processing"),
    ],
)
def test_opt_and_llama_quantize_evaluate_and_save(script, tmp_path, name, model, flags):
    words = (*flags.split(), "--save", tmp_path / "NAME", *EVALUATED)
    status, _, err = script(name, model, "text.txt", *words, *SMALL)
    assert status == 0, err
    report = json.loads((tmp_path / "NAME" / "run.json").read_text())
    assert list(report["perplexity"]) == ["text.txt"]
    asked = report["flags"]
    assert {"wbits": asked["wbits"], "quant": asked["quant"]} == {
        "wbits": int(words[1]),
        "quant": words[3],
    }
    assert asked["incoh_processing"] == ("--incoh_processing" in words)


# main.py


@pytest.fixture
def asked(monkeypatch) -> list[Experiment]:
    """What would be run."""
    found: list[Experiment] = []

    def stop(one: Experiment) -> None:
        found.append(one)
        raise SystemExit(0)

    monkeypatch.setattr(run, "run_experiment", stop)
    return found


@pytest.mark.parametrize(
    ("words", "bits", "windows", "task"),
    [
        ("--wbits 16 --nsamples 0 --task arc_easy", 16, 128, "arc_easy"),
        ("--load NAME --nsamples 0 --task lambada", 16, 128, "lambada_quip"),
        ("--nsamples 0 --task piqa", 16, 128, "piqa"),
        ("--wbits 4 --task piqa", 4, 128, "piqa"),
        ("--wbits 4 --nsamples 7 --task piqa", 4, 7, "piqa"),
        ("--codebook E8P12 --task piqa", 2, 128, "piqa"),
    ],
)
def test_main_measures_tasks_of_a_model_or_a_checkpoint(script, asked, words, bits, windows, task):
    assert script("main.py", "opt", "c4", *words.split())[0] == 0
    (one,) = asked
    assert (one.model, one.dataset, one.nsamples, one.eval_datasets) == ("opt", "c4", windows, ())
    assert one.tasks.tasks == (task,)
    assert (one.flags["wbits"], one.recipe is None) == (bits, bits == 16)
    assert one.load == ("NAME" if "--load" in words else None)
    assert "task" not in one.flags


def test_main_takes_further_tasks_and_evaluations(script, asked):
    line = "--task lambada,arc_easy --wbits 16 --eval_datasets c4 --limit 3"
    assert script("main.py", "opt", "c4", *line.split())[0] == 0
    assert asked[0].tasks.tasks == ("lambada_quip", "arc_easy")
    assert (asked[0].tasks.limit, asked[0].eval_datasets) == (3, ("c4",))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--wbits 4 --nsamples 0 --task piqa", "--nsamples 0 with --wbits 4: calibration needs"),
        ("--codebook E8P12 --nsamples 0 --task piqa", "--nsamples 0 with --codebook E8P12: calib"),
        ("--wbits 16 --nsamples -1 --task piqa", "--nsamples -1: at least 1"),
        ("--wbits 16 --nsamples none --task piqa", "--nsamples: invalid int value: 'none'"),
        ("--load NAME --wbits 4 --nsamples 0 --task piqa", "leave out --wbits"),
        ("--wbits 16", "the following arguments are required: --task"),
    ],
)
def test_what_main_cannot_do_is_one_line(script, asked, words, reason):
    status, out, err = script("main.py", "opt", "c4", *words.split())
    assert (status, out, len(err)) == (2, "", 1)
    assert reason in err[0]
    assert not asked


# The bench


def test_opt_saveh_keeps_the_hessians_that_opt_proxy_and_compute_hsummary_read(script, tmp_path):
    store, result = tmp_path / "DIR", tmp_path / "FILE"
    flags = ("--wbits", "4", "--quant", "ldlq")
    status, out, err = script("opt_saveH.py", "opt", "text.txt", *flags, "--save", store, *SMALL)
    assert status == 0, err
    assert out.endswith(f"quip run opt --hessians {store} --wbits 4\n")
    assert json.loads((store / "manifest.json").read_text())["source"] != "original"
    status, out, err = script("compute_Hsummary.py", "--dirname", store, "--savename", result)
    assert status == 0, err
    assert (result / "summary.json").exists()
    words = ("text.txt", "--model", "opt", "--hessians", store, *flags, "--device", "cpu")
    status, out, err = script("opt_proxy.py", *words)
    assert status == 0, err
    assert out.endswith("over 24 matrices\n")


def test_opt_proxy_collects_by_itself(script):
    words = ("text.txt", "--model", "opt", "--wbits", "4", "--quant", "ldlq", *SMALL)
    status, out, err = script("opt_proxy.py", *words)
    assert status == 0, err
    assert out.endswith("over 24 matrices\n")


def test_the_two_of_optq_print_their_tables(script):
    assert "16" in script("optq_counter.py", "--n", "16")[1]
    assert "20 x 20" in script("optq_ldlq_equiv.py", "--n", "20")[1]


# The scripts of GPTVQ's experiments; its llama.py has a file of its own


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("bigtable", "Learned vector codebooks beside GPTQ"),
        ("target_bitwidth", "The precision of the codebooks at equal bits"),
        ("scaling", "Block scaling at equal bits"),
        ("m_step", "The update of the codebooks after the sweep"),
        ("kmeans_init", "Seeds of the codebooks"),
        ("hessian_weighting", "Codebooks fitted to what errors cost, and to the weights alone"),
    ],
)
def test_an_experiment_of_gptvq_is_a_table_of_any_models(script, tmp_path, name, title):
    words = ("--models", "opt", "--render", "--out", tmp_path)
    status, out, err = script(f"gptvq/{name}.py", *words)
    assert status == 0, err
    assert out.startswith(f"## {title}\n")
    assert "| opt |" in out


def test_codebooks_without_feedback_are_a_run(script, asked):
    words = ("--vq_dim", "2", "--wbits", "2", "--groupsize", "64")
    assert script("gptvq/non_unif_no_opt.py", "opt", "c4", *words)[0] == 0
    assert (asked[0].flags["quant"], asked[0].flags["codebook"]) == ("nearest", "vq")
