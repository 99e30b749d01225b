"""The card of a checkpoint: what its report knows, and nothing that it does not."""

import argparse
import math
import shlex
from pathlib import Path

import pytest
import yaml

from quip.cli import run
from quip.jobs.report.card import UNSAID, model_card
from quip.jobs.report.text import size_words

SHA = "0c185614" + 56 * "0"
STARTED = {
    "model": "facebook/opt-125m",
    "dataset": "c4",
    "method": "ldlq, 2 bits, with incoherence processing",
    "seed": 3,
    "flags": {
        "model": "facebook/opt-125m",
        "dataset": "c4",
        "wbits": 2,
        "incoh_processing": True,
        "faithful": False,
        "rho": None,
        "num_fewshot": 0,
        "out": Path("/home/somebody/runs/7"),
        "save": "/home/somebody/opt-2bit",
        "device": "cuda:1",
    },
    "recipe": {"codebook": {"name": "RmsGrid", "bits": 2}},
    "calibration": {
        "dataset": "c4",
        "split": "train",
        "windows": 128,
        "seqlen": 2048,
        "sha256": SHA,
    },
    "evaluation": {
        "wikitext2": {"split": "test", "windows": 140, "seqlen": 2048, "sha256": SHA},
        "ptb": {"split": "test", "windows": 50, "seqlen": 2048, "sha256": SHA},
    },
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
}
SAVED = STARTED | {
    "totals": {
        "matrices": 72,
        "weights": 84934656,
        "bits_per_weight": 2.1234,
        "mean_proxy_loss": 0.01234,
    },
    "checkpoint": {"bytes": 101_500_000, "dense_bytes": 250_478_592},
}
COMPLETE = SAVED | {
    "perplexity": {"wikitext2": 40.125, "ptb": math.inf},
    "original_perplexity": {"wikitext2": 27.65},
    "tasks": {"arc_easy": {"acc": 0.41234, "acc_stderr": 0.01, "samples": 2376, "version": 1}},
}


def front_matter(card: str) -> dict:
    _, words, _ = card.split("---\n", 2)
    return yaml.safe_load(words)


def row(card: str, name: str) -> list[str]:
    """The cells of the table row that begins with this name."""
    [line] = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_front_matter_is_what_the_hub_reads():
    assert front_matter(model_card(COMPLETE, folder_name="opt-2bit")) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quip", "quantized", "2-bit"],
        "base_model": "facebook/opt-125m",
        "base_model_relation": "quantized",
    }


@pytest.mark.parametrize(
    "name", ["demo", "/models/opt", "./opt", "../models/opt", "models/opt.gguf", "models/here", ""]
)
def test_a_base_model_is_claimed_only_where_the_name_can_be_a_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "here").mkdir(parents=True)
    card = model_card(COMPLETE | {"model": name}, folder_name="a")
    assert not {"base_model", "base_model_relation"} & front_matter(card).keys()


def test_loading_begins_with_the_import_and_says_what_happens_without():
    card = model_card(COMPLETE, folder_name="opt-2bit")
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert code.startswith("import quip")
    assert 'AutoModelForCausalLM.from_pretrained("opt-2bit")' in code
    assert 'quip.load("opt-2bit")' in card
    assert "Without `import quip`" in card
    assert "random" in card
    words = " ".join(card.split())
    for way in ("quip evaluate opt-2bit --tasks", "quip export opt-2bit OUT --dense"):
        assert way in words
    assert "python -m quip.lm_eval --model hf --model_args pretrained=opt-2bit " in words


def test_sizes_and_scores_stand_beside_what_they_depend_on():
    card = model_card(COMPLETE, folder_name="opt-2bit")
    assert row(card, "bits per weight of the quantized matrices") == ["2.123"]
    assert row(card, "weights in them") == ["84,934,656"]
    assert row(card, "size on disk") == ["101.50 MB"]
    assert row(card, "size of the same weights in 16 bits") == ["250.48 MB"]
    assert row(card, "wikitext2") == ["27.65", "40.12", "test", "140", "2048", "0c185614"]
    assert row(card, "ptb") == ["-", "inf", "test", "50", "2048", "0c185614"]
    assert row(card, "arc_easy") == ["acc", "0.412 ± 0.010", "2376"]
    assert "128 windows of 2048 tokens of c4 (split train, SHA-256 of the tokens 0c1856" in card
    assert "Method: ldlq, 2 bits, with incoherence processing; seed 3." in card
    assert "python 3.11.7, torch 2.13.0" in card


def test_words_for_numbers_that_json_lacks_are_read_as_they_stand_in_run_json():
    card = model_card(COMPLETE | {"perplexity": {"ptb": "nan"}}, folder_name="a")
    assert row(card, "ptb")[:2] == ["-", "nan"]


def test_a_run_that_is_not_over_gives_a_card_of_what_it_knows():
    started, saved = (model_card(report, folder_name="a") for report in (STARTED, SAVED))
    assert "## Size" not in started
    assert "## Size" in saved
    for card in (started, saved):
        assert "Perplexity" not in card
        assert "Zero-shot" not in card
        assert "## Method" in card
        assert "None" not in card
    empty = model_card({}, folder_name="a")
    assert front_matter(empty)["tags"] == ["quip", "quantized"]
    assert [line for line in empty.splitlines() if line.startswith("#")] == ["# a", "## Loading"]
    nothing = dict.fromkeys(COMPLETE)  # present, but None, as for a run without a recipe
    assert model_card(nothing, folder_name="a") == empty


def test_the_command_line_names_no_places_and_nothing_left_alone():
    card = model_card(COMPLETE, folder_name="a")
    assert "\nquip run facebook/opt-125m c4 --wbits 2 --incoh_processing\n" in card
    assert "somebody" not in card
    assert "cuda" not in card


def test_the_command_line_can_be_pasted():
    flags = {"model": "my models/opt", "dataset": "c4", "eval_datasets": ("a b.txt", "c4")}
    card = model_card(STARTED | {"model": "my models/opt", "flags": flags}, folder_name="a")
    [line] = [line for line in card.splitlines() if line.startswith("quip run")]
    assert shlex.split(line)[2:] == ["my models/opt", "c4", "--eval_datasets", "a b.txt,c4"]


def test_flags_of_tasks_are_said_with_tasks():
    flags = STARTED["flags"] | {"tasks": "arc_easy"}
    card = model_card(STARTED | {"flags": flags}, folder_name="a")
    assert "--num_fewshot 0 --tasks arc_easy" in card


def test_every_flag_that_holds_a_path_is_left_out():
    parser = argparse.ArgumentParser()
    run.build(parser)
    paths = {action.dest for action in parser._actions if action.type is Path}
    paths -= {"hessians", "plan"}  # an input, as DATASET is; and a file that the card holds
    assert {"out", "config"} <= paths <= set(UNSAID)


def test_the_plot_is_shown_where_there_is_one():
    assert "](layers.png)" in model_card(COMPLETE, folder_name="a", has_plot=True)
    assert "layers.png" not in model_card(COMPLETE, folder_name="a")


def test_a_bar_in_a_name_ends_no_cell():
    card = model_card(COMPLETE | {"perplexity": {"a|b": 2.0}, "evaluation": {}}, folder_name="a")
    assert "| a\\|b | - | 2 | - | - | - | - |" in card


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (1_580_000, "1.58 MB"),
        (25 * 10**8, "2.50 GB"),
    ],
)
def test_sizes_are_words_in_decimal_units(count, words):
    assert size_words(count) == words
