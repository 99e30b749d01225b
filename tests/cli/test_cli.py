"""The command line: one line and a status for everything that cannot be, and runs for the rest."""

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from quip import cli
from quip import run as door
from quip.cli import flags
from quip.cli import run as run_command
from quip.cli.parse import Parser
from quip.data import DATASETS
from quip.matrix.build import build_recipe
from quip.matrix.flags import FLAGS
from quip.matrix.methods import METHODS
from tests.support.gguf_files import write_gguf
from tests.support.runs import save_model, write_text
from tests.support.tiny import tiny

pytestmark = pytest.mark.usefixtures("command")


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "opt")


@pytest.fixture
def quip(capsys, folder, opt):
    """quip("flags") -> status, output and lines of stderr; MODEL stands for a tiny OPT."""

    def call(line: str) -> tuple[int, str, list[str]]:
        words = [opt if word == "MODEL" else word.replace("''", "") for word in line.split()]
        status = door.main(words)
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return call


def never(*args: object, **options: object) -> None:
    raise AssertionError("this is work that should not have been started")


SMALL = "--nsamples 8 --seqlen 16 --eval_datasets test.txt --eval_nsamples 3"

# Refused before a model is looked for.
AT_ONCE = [
    ("demo", "the following arguments are required: dataset"),
    ("demo pydoc --zork", "unrecognized arguments: --zork (--help explains every flag)"),
    ("demo pydoc --wbits 9", "argument --wbits: invalid choice: 9"),
    ("demo pydoc --wbits two", "argument --wbits: invalid number value: 'two'"),
    ("demo pydoc --quant zork", "argument --quant: invalid choice: 'zork'"),
    ("demo pydoc --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    ("demo pydoc --wbits 2 --qfn b", "--qfn b needs --pre_proj"),
    ("demo pydoc --wbits 2 --incoh_processing --qfn a", "--incoh_processing means --qfn b"),
    ("demo pydoc --wbits 2 --incoh_processing --groupsize 8", "--groupsize 8 speaks of grid a"),
    ("demo pydoc --wbits 2 --quant ldlqRG --unbiased", "--unbiased with 10 greedy passes"),
    ("demo pydoc --wbits 2 --range tensor", "--range tensor speaks of grid b"),
    ("demo pydoc --wbits 2 --incoh_processing --range 0", "--range 0: say tensor, column or"),
    ("demo pydoc --wbits 2 --npasses -1", "--npasses -1: it cannot be negative"),
    ("demo pydoc --wbits 2 --percdamp nan", "--percdamp nan: damping is a finite share"),
    ("demo pydoc --nsamples 0", "--nsamples 0: at least 1 is needed"),
    ("demo pydoc --seqlen 1", "--seqlen 1: at least 2 is needed"),
    ("demo pydoc --eval_nsamples 0", "--eval_nsamples 0: at least 1 is needed"),
    ("demo pydoc --proxy_only", "--proxy_only needs weights to quantize: give --wbits 2 to 8"),
    ("demo pydoc --wbits 2 --proxy_only --compare", "--proxy_only evaluates nothing"),
    ("demo pydoc --eval_datasets none", "--wbits 16 means to evaluate"),
    ("demo pydoc --wbits 2 --compare --eval_datasets none", "--compare means to evaluate"),
    ("demo pydoc --eval_datasets ,", "--eval_datasets ',': name one or more"),
    ("demo pydoc --eval_datasets ''", "--eval_datasets '': name one or more"),
    ("demo train.txt --wbits 2", "train.txt is a file or folder: say where to measure perplexity"),
    ("demo wikitxt2", "unknown data set 'wikitxt2': choose wikitext2, ptb, ptb-new, c4"),
    ("demo nowhere.txt", "unknown data set 'nowhere.txt'"),
    ("demo pydoc --eval_datasets pydoc,nowhere.txt", "unknown data set 'nowhere.txt'"),
    ("demo used --eval_datasets test.txt --wbits 2 --device zork", "--device zork: no such kind"),
    ("demo pydoc --device meta", "--device meta: "),
    ("demo pydoc --out used", "--out used: it exists and is not empty; name another folder or add"),
    ("demo pydoc --out train.txt", "--out train.txt: it is a file; name a folder"),
    ("demo pydoc --out train.txt/run", "train.txt is no folder that can be written to"),
    ("demo pydoc --overwrite", "--overwrite speaks of folders: name one"),
    ("demo pydoc --config nowhere.yaml", "--config nowhere.yaml: cannot be read as YAML"),
]


@pytest.mark.parametrize(("line", "reason"), AT_ONCE)
def test_a_wrong_request_is_one_line_and_status_2_before_a_model_is_loaded(
    quip, monkeypatch, line, reason
):
    monkeypatch.setattr("quip.jobs.run.load_model", never)
    status, out, err = quip(line)
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith("quip: ")
    assert reason in err[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_not_there_is_a_wrong_request(quip, monkeypatch):
    monkeypatch.setattr("quip.jobs.run.load_model", never)
    status, _, [line] = quip("demo pydoc --device cuda")
    assert (status, "--device cuda: " in line, "say cpu" in line) == (2, True, True)


@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        ("./nowhere/model pydoc", 1, "no such file or folder, and not of the form of a hub id"),
        ("nobody/nothing pydoc", 1, "nobody/nothing is no local folder, and as a hub id: "),
        ("MODEL train.txt --seqlen 33 --eval_datasets test.txt", 2, "above the 32 positions"),
        ("opt.gguf pydoc", 1, "opt.gguf holds a model of architecture 'opt'"),
        ("train.gguf pydoc", 1, "train.gguf is not a GGUF file, or a truncated one"),
    ],
)
def test_a_model_that_cannot_be_is_one_line_before_weights_are_read(
    quip, folder, monkeypatch, line, status, reason
):
    write_gguf(folder / "opt.gguf", tiny("llama"), architecture="opt")
    write_text(folder / "train.gguf")
    monkeypatch.setattr("quip.model.load._weights", never)
    found, out, err = quip(line)
    assert (found, out, len(err)) == (status, "", 1)
    assert reason in err[0]


@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        (
            f"MODEL train.txt --wbits 2 {SMALL} --nsamples 99",
            2,
            "train.txt: 600 tokens, but 99 windows of 16 ask for 1584; lower --nsamples to 37 or",
        ),
        (
            f"MODEL test.txt {SMALL} --eval_datasets short.txt",
            2,
            "short.txt: 5 tokens are less than one window of 16; lower --seqlen or give more text",
        ),
        (f"MODEL wikitext2 --wbits 2 {SMALL}", 1, "wikitext2: not to be had from the hub"),
        (f"MODEL train.txt {SMALL} --eval_datasets c4", 1, "c4: not to be had from the hub"),
        (f"broken train.txt {SMALL}", 1, "layers.2.fc1.weight: NaN or infinity among the weights"),
    ],
)
def test_data_and_weights_that_cannot_be_used_are_one_line_before_anything_is_computed(
    quip, folder, monkeypatch, line, status, reason
):
    write_text(folder / "short.txt", 5)
    if "broken" in line:
        save_model(folder / "broken", model__decoder__layers__2__fc1__weight=math.nan)
    monkeypatch.setattr("quip.jobs.run.quantize_matrix_by_matrix", never)
    monkeypatch.setattr("quip.jobs.evaluate.perplexity", never)
    found, out, err = quip(line)
    assert (found, out, len(err)) == (status, "", 1)
    assert err[0].startswith("quip: ")
    assert reason in err[0]


def test_what_fails_on_the_way_is_the_last_line_and_the_report_stays(quip, folder):
    huge = {f"model.decoder.layers.1.fc1.{part}": 1e38 for part in ("weight", "bias")}
    save_model(folder / "huge", **huge)
    status, out, err = quip(f"huge train.txt --wbits 2 --out run {SMALL}")
    assert (status, out) == (1, "")
    assert err[-1].startswith("quip: model.decoder.layers.1.fc2: NaN or infinity among its inputs")
    assert all(": 2." in line and "proxy loss" in line for line in err[:-1])  # block 0, by matrix
    report = json.loads((folder / "run" / "run.json").read_text())
    assert report["status"] == "failed"
    assert len(report["matrices"]) == len(err) - 1 == 6


def test_an_interrupt_is_one_line_and_the_status_of_a_signal(quip, monkeypatch):
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quip.jobs.run.load_model", interrupt)
    assert quip("demo pydoc") == (130, "", ["quip: interrupted"])


def test_16_bits_evaluate_the_model_as_it_is(quip, folder):
    status, out, _ = quip(f"MODEL train.txt {SMALL} --out run")
    assert status == 0
    assert "as it is" in out
    assert re.search(r"^test.txt +\d+(\.\d+)?  3 of \d+ windows x 16 tokens$", out, re.MULTILINE)
    assert json.loads((folder / "run" / "run.json").read_text())["recipe"] is None


@pytest.mark.parametrize("quant", METHODS)
def test_every_method_runs_and_is_compared(quip, quant):
    status, out, _ = quip(f"MODEL train.txt --wbits 3 --quant {quant} --compare {SMALL}")
    assert status == 0
    assert f"{quant}, 3 bits, without incoherence processing" in out
    assert "24 matrices at" in out
    line = r"^test.txt( +[\d.]+){2} +[+-][\d.]+%  3 of \d+ windows x 16 tokens$"
    assert re.search(line, out, re.MULTILINE)


def test_proxy_only_evaluates_nothing(quip, monkeypatch):
    monkeypatch.setattr("quip.jobs.evaluate.perplexity", never)
    status, out, _ = quip("MODEL train.txt --wbits 2 --proxy_only --nsamples 8 --seqlen 16")
    assert status == 0
    assert "mean proxy loss" in out
    assert "perplexity" not in out


def test_a_folder_is_overwritten_when_asked(quip, folder):
    status, _, _ = quip(f"MODEL train.txt {SMALL} --out used --overwrite")
    assert status == 0
    assert (folder / "used" / "run.json").exists()
    assert (folder / "used" / "notes.txt").read_text() == "mine"


def test_flags_become_plain_values(asked, tmp_path):
    e = asked(
        "demo c4 --wbits 3 --quant ldlqRG --incoh_processing --npasses 4 --rho 2.5 --range 8 "
        "--percdamp 0.1 --nsamples 5 --seqlen 64 --seed 7 --dtype bfloat16 --eval_nsamples 2 "
        f"--compare --pre_proj_extra 2 --lazy_batch --pre_gptqH --out {tmp_path / 'x'}".split()
    )
    assert e.recipe == build_recipe(
        quant="ldlqRG",
        wbits=3,
        incoh_processing=True,
        npasses=4,
        rho=2.5,
        range_="8",
        percdamp=0.1,
        pre_proj_extra=2,
    )
    assert (e.model, e.dataset, e.nsamples, e.seqlen, e.seed) == ("demo", "c4", 5, 64, 7)
    assert (e.dtype, e.eval_nsamples, e.compare, e.out) == ("bfloat16", 2, True, tmp_path / "x")
    assert e.eval_datasets == ("wikitext2", "ptb-new", "c4-new")
    assert e.method == "ldlqRG, 3 bits, with incoherence processing"


@pytest.mark.parametrize("flags", ["--groupsize 8", "--incoh_processing", "--quant gptq"])
def test_flags_of_a_recipe_without_bits_are_refused(quip, flags):
    status, _, [line] = quip(f"demo pydoc {flags}")
    assert status == 2
    assert line.startswith(f"quip: {flags} speaks of weights that are quantized: give --wbits")


def test_every_flag_is_in_the_report(asked):
    parser = Parser()
    run_command.build(parser)
    # That there is no plan is not said.
    names = {action.dest for action in parser._actions} - {"help", "plan"}
    assert asked(["demo", "pydoc"]).flags.keys() == names


def test_incoherence_processing_is_short_for_its_four_flags(asked):
    short = asked(["demo", "pydoc", "--wbits", "2", "--incoh_processing"])
    long = asked(
        [
            "demo",
            "pydoc",
            "--wbits",
            "2",
            "--pre_gptqH",
            "--pre_rescale",
            "--pre_proj",
            "--qfn",
            "b",
        ]
    )
    assert short.recipe == long.recipe
    assert "without" in long.method  # the words speak of the flag
    assert short.recipe != asked(["demo", "pydoc", "--wbits", "2"]).recipe


@pytest.mark.parametrize(
    ("line", "sets"),
    [
        ("demo pydoc", ("pydoc",)),
        ("demo c4", ("wikitext2", "ptb-new", "c4-new")),
        ("demo pydoc --eval_datasets ptb,a.txt", ("ptb", "a.txt")),
        ("demo a.txt --wbits 2 --eval_datasets none", ()),
        ("demo a.txt --wbits 2 --proxy_only", ()),
    ],
)
def test_where_perplexity_is_measured_follows_from_the_data_set_unless_said(
    asked, folder, line, sets
):
    assert asked(line.split()).eval_datasets == sets


def test_a_folder_named_like_a_data_set_does_not_hide_it(asked, folder):
    (folder / "wikitext2").mkdir()
    assert "wikitext2" in asked(["demo", "wikitext2"]).eval_datasets
    assert flags.NAMED == DATASETS


CONFIG = {
    "wbits": 2,
    "quant": "gptq",
    "incoh_processing": True,
    "unbiased": False,
    "rho": None,
    "seed": -3,
    "eval_datasets": ["pydoc", "c4"],
}


@pytest.mark.parametrize("order", ["{config} {flags}", "{flags} {config}"])
def test_flags_on_the_line_win_over_those_of_a_file_wherever_they_stand(asked, folder, order):
    (folder / "a.yaml").write_text(yaml.safe_dump(CONFIG))
    line = "demo pydoc " + order.format(config="--config a.yaml", flags="--quant ldlq --wbits 4")
    e = asked(line.split())
    assert e.recipe == build_recipe(quant="ldlq", wbits=4, incoh_processing=True)
    assert (e.seed, e.eval_datasets) == (-3, ("pydoc", "c4"))
    assert e.flags["config"] == [Path("a.yaml")]


def test_even_the_default_wins_when_it_is_said(asked, folder):
    (folder / "a.yaml").write_text(yaml.safe_dump(CONFIG))
    assert asked(["demo", "pydoc", "--wbits", "16", "--config", "a.yaml"]).recipe is None


def test_a_file_switches_off_what_a_recipe_switches_on(asked, folder):
    (folder / "off.yaml").write_text("incoh_processing: false\n")
    e = asked(["demo", "pydoc", "--recipe", "quip-2bit", "--config", "off.yaml"])
    assert e.recipe == build_recipe(wbits=2)
    assert (e.flags["incoh_processing"], e.method) == (
        False,
        "ldlq, 2 bits, without incoherence processing",
    )
    line = "demo pydoc --recipe quip-2bit --config off.yaml --incoh_processing"
    assert asked(line.split()).recipe == build_recipe(wbits=2, incoh_processing=True)
    line = "demo pydoc --recipe quip-2bit --no-incoh_processing"
    assert asked(line.split()).recipe == build_recipe(wbits=2)


SWITCHES = [name for name, known in FLAGS.items() if known.metadata["said"].kind is bool]


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_is_off_where_the_line_or_a_later_file_says_so(asked, folder, name):
    (folder / "on.yaml").write_text(
        "wbits: 2\n" + "".join(f"{x}: true\n" for x in {"pre_proj", name})
    )
    (folder / "off.yaml").write_text(f"{name}: false\n")
    on = "demo pydoc --config on.yaml"
    for line in (f"{on} --no-{name}", f"{on} --config off.yaml", f"{on} --{name} --no-{name}"):
        assert asked(line.split()).flags[name] is False
    for line in (on, f"--config off.yaml {on}", f"{on} --config off.yaml --{name}"):
        if name not in ("no_fuse", "own_table"):  # of some codebooks alone
            assert asked(line.split()).flags[name] is True


def test_what_is_no_recipes_switch_is_off_where_a_later_file_says_so(asked, folder):
    (folder / "on.yaml").write_text("compare: true\n")
    (folder / "off.yaml").write_text("compare: false\n")
    assert asked(["demo", "pydoc", "--config", "on.yaml"]).compare
    assert not asked(["demo", "pydoc", "--config", "on.yaml", "--config", "off.yaml"]).compare


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--num_fewshot 0", "--num_fewshot speaks of zero-shot tasks"),
        ("--ft_lr 5e-5 --wbits 2", "--ft_lr speaks of fine-tuning"),
        ("--rho wide", "--rho wide: a positive number or auto is needed"),
        ("--percdamp -1", "--percdamp -1.0: damping is a finite share"),
    ],
)
def test_what_is_said_counts_though_it_is_the_default_or_nothing_is_quantized(quip, line, reason):
    status, out, err = quip(f"demo pydoc {line}")
    assert (status, out, len(err)) == (2, "", 1)
    assert reason in err[0]


def test_a_later_file_wins_over_an_earlier_one_in_both_commands(asked, folder):
    (folder / "a.yaml").write_text("wbits: 2\nseed: 1\n")
    (folder / "b.yaml").write_text("wbits: 3\n")
    for main, words in ((door.main, []), (cli.main, ["run"])):
        e = asked([*words, *["demo", "pydoc", "--config", "a.yaml", "--config", "b.yaml"]], main)
        assert (e.flags["wbits"], e.seed) == (3, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("wbits: 9", "argument --wbits: invalid choice: 9"),
        ("wbits: two", "argument --wbits: invalid number value: 'two'"),
        ("quant: zork", "argument --quant: invalid choice: 'zork'"),
        ("nsamples: 1.5", "argument --nsamples: invalid int value: '1.5'"),
        ("zork: 1", "unknown name 'zork'; names are those of flags"),
        ("model: demo", "unknown name 'model'"),
        ("config: a.yaml", "unknown name 'config'"),
        ("help: true", "unknown name 'help'"),
        ("compare: 1", "compare is a switch: say true or false, not 1"),
        ("- wbits", "a mapping of flag names to values is expected"),
        ("wbits: [", "cannot be read as YAML"),
    ],
)
def test_values_of_a_file_are_checked_like_flags_and_the_file_is_named(quip, folder, text, reason):
    (folder / "a.yaml").write_text(text)
    status, out, err = quip("demo pydoc --config a.yaml")
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith("quip: --config a.yaml: ")
    assert reason in err[0]


def test_values_of_a_file_are_refused_for_the_same_reasons_as_flags(quip, folder, monkeypatch):
    monkeypatch.setattr("quip.jobs.run.load_model", never)
    (folder / "a.yaml").write_text("wbits: 2\nqfn: b\n")
    assert quip("demo pydoc --config a.yaml") == quip("demo pydoc --wbits 2 --qfn b")


def test_an_empty_file_of_flags_changes_nothing(asked, folder):
    (folder / "a.yaml").write_text("")
    assert asked(["demo", "pydoc", "--config", "a.yaml"]).recipe is None


def test_the_help_explains_every_flag_in_groups(capsys):
    with pytest.raises(SystemExit, match="0"):
        door.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for group in ("method:", "incoherence processing:", "data and evaluation:"):
        assert group in text
    parser = Parser()
    run_command.build(parser)
    for action in parser._actions:
        assert action.help, action.dest
        assert action.help is argparse.SUPPRESS or len(action.help) > 10
        assert all(option in text for option in action.option_strings)


def test_the_methods_of_the_help_are_those_of_the_table():
    parser = Parser()
    run_command.build(parser)
    [quant] = [action for action in parser._actions if action.dest == "quant"]
    assert quant.choices == list(METHODS)


@pytest.mark.slow
def test_the_demo_on_pydoc_loses_little_at_4_bits_and_runs_by_both_names(capsys, tmp_path):
    words = [
        "demo",
        "pydoc",
        "--wbits",
        "4",
        "--incoh_processing",
        "--compare",
        "--nsamples",
        "16",
        "--seqlen",
        "64",
    ]
    words += ["--eval_nsamples", "8"]
    assert cli.main(["run", *words, "--out", str(tmp_path / "a")]) == 0
    assert door.main([*words, "--out", str(tmp_path / "b")]) == 0
    reports = [json.loads((tmp_path / name / "run.json").read_text()) for name in "ab"]
    for key in ("perplexity", "original_perplexity", "calibration", "evaluation", "totals"):
        assert reports[0][key] == reports[1][key]
    before, after = (reports[0][key]["pydoc"] for key in ("original_perplexity", "perplexity"))
    assert before < 2048 / 4  # far better than a guess
    assert abs(after / before - 1) < 0.1
    assert "pydoc" in capsys.readouterr().out


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_light_and_its_names_come_when_used():
    code = """
import sys, quip
heavy = {"torch", "transformers", "datasets", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert set(quip.__all__) <= set(dir(quip))
quip.quantize_matrix, quip.Recipe, quip.build_recipe, quip.__version__
assert not {"transformers", "datasets"} & set(sys.modules)
assert quip.build_recipe(quant="ldlq", wbits=2).__class__ is quip.Recipe
for name in quip.__all__:
    assert getattr(quip, name) == getattr(quip, name)
try:
    quip.zork
except AttributeError as error:
    print(error)
"""
    assert python(code) == "module 'quip' has no attribute 'zork'\n"


def test_a_command_line_that_is_refused_never_waits_for_torch():
    code = """
import sys
from quip.run import main
assert main(["demo", "pydoc", "--wbits", "9"]) == 2
assert "torch" not in sys.modules
"""
    python(code)
