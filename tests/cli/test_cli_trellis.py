"""The command line of trellis codes: bits that are no whole number, tiles, a model of both."""

import csv
import json

import pytest

from quip import cli
from quip import run as door
from quip.jobs.plan import build_plan
from quip.matrix.build import build_recipe
from quip.matrix.methods import RECIPES
from tests.support.hessians import observed, written
from tests.support.runs import save_model

pytestmark = pytest.mark.usefixtures("command")
SMALL = ("--trellis_code", "mul1", "--trellis_states", "6")


@pytest.mark.parametrize(("said", "bits"), [("2", 2), ("2.0", 2), ("1.5", 1.5), ("3.50", 3.5)])
def test_bits_are_kept_as_numbers_that_are_whole_where_they_can_be(asked, said, bits):
    e = asked(["demo", "pydoc", "--codebook", "trellis", "--wbits", said])
    assert e.flags["wbits"] == bits
    assert type(e.flags["wbits"]) is type(bits)
    assert e.recipe == build_recipe(codebook="trellis", wbits=bits)
    assert e.method == f"ldlq, trellis ({bits} bits)"


def test_flags_of_trellis_codes_become_plain_values(asked, folder):
    line = "--codebook trellis --wbits 2 --trellis_code mcg --trellis_states 14 --tile 16x16"
    flags = {"trellis_code": "mcg", "trellis_states": 14, "tile": "16x16"}
    recipe = build_recipe(codebook="trellis", wbits=2, **flags)
    assert asked(["demo", "pydoc", *line.split()]).recipe == recipe
    (folder / "a.yaml").write_text(
        "codebook: trellis\nwbits: 2.0\ntrellis_code: mcg\ntrellis_states: 14\ntile: 16x16\n"
    )
    assert asked(["demo", "pydoc", "--config", "a.yaml"]).recipe == recipe
    (folder / "plan.yaml").write_text(
        '"*.v_proj": {recipe: trellis-4bit, tile: 32x1}\n'
        '"*": {codebook: trellis, wbits: 1.5, trellis_states: 10}\n'
    )
    plan = asked(["demo", "pydoc", "--plan", "plan.yaml"]).recipe
    assert plan == build_plan(
        {
            "*.v_proj": {**RECIPES["trellis-4bit"].flags, "tile": "32x1"},
            "*": {"codebook": "trellis", "wbits": 1.5, "trellis_states": 10},
        }
    )
    assert [rule.recipe.codebook.bits for rule in plan.rules] == [4, 1.5]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--wbits 2.5", "--wbits 2.5: int has 2, 3, 4, 5, 6, 7, 8 bits; say one of them, or --cod"),
        ("--wbits 2.7 --codebook trellis", "argument --wbits: invalid choice: 2.7"),
        ("--wbits 16.5", "argument --wbits: invalid choice: 16.5"),
        ("--wbits nan", "argument --wbits: invalid choice: nan"),
        ("--wbits two", "argument --wbits: invalid number value: 'two'"),
        ("--recipe trellis-2bit --tile 16", "--tile 16: rows x columns are needed, as in 256x1"),
        ("--recipe trellis-2bit --trellis_states 9", "learned codes have 8, 10, 12"),
        ("--recipe quip-2bit --trellis_code mcg", "--trellis_code mcg speaks of trellis: say"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, line, reason):
    assert door.main(["demo", "pydoc", *line.split()]) == 2
    (found,) = capsys.readouterr().err.splitlines()
    assert reason in found


def test_help_names_the_codes_and_the_bits(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "--wbits {1,1.5,2,2.5,3,3.5,4,5,6,7,8,16}" in words
    assert "--trellis_code {learned,mcg,mul1,1mad,3inst,int8,hyb}" in words
    assert "--trellis_states N" in words
    assert "--tile AxB" in words


def test_losses_of_trellises_fall_with_half_bits_and_are_taken_up(quip, tmp_path):
    store = tmp_path / "store"
    written(store, observed("opt"))
    line = ["proxy", save_model(tmp_path / "opt"), store, "--codebook", "trellis", *SMALL]
    line += ["--quant", "ldlq", "--layers", "layers.0.fc1", "--device", "cpu"]
    out = tmp_path / "out"
    assert quip(*line, "--wbits", "1.5,2", "--out", out)[0] == 0
    status, shown, _ = quip(*line, "--wbits", "1.5,2,2.5", "--out", out, "--resume")
    assert status == 0
    head, losses = (words.split() for words in shown.splitlines()[:2])
    assert head[-6:] == ["2.5", "bits", "2", "bits", "1.5", "bits"]
    assert sorted(map(float, losses[-3:])) == [float(x) for x in losses[-3:]]
    with (out / "proxy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["wbits"] for row in rows] == ["1.5", "2", "2.5"]
    codes = (3 * 16, 2 * 32, 5 * 16)  # bits of a row of 32 weights, in words of 32
    for row, bits in zip(rows, codes, strict=True):  # scales of 8 columns, and signs
        stored = 48 * -(-bits // 32) * 32 + 4 * 32 + 80 * 16
        assert float(row["bits_per_weight"]) == stored / (48 * 32)


def test_flags_of_trellises_without_one_are_told(quip, tmp_path):
    written(tmp_path / "store", observed("opt"))
    line = ["proxy", save_model(tmp_path / "opt"), tmp_path / "store", "--tile", "16x16"]
    status, _, [error] = quip(*line)
    assert (status, error) == (2, "quip: --tile speaks of trellis codes: add --codebook trellis")


def test_a_model_goes_through_the_whole_house(quip, folder):
    model = save_model(folder / "llama", "llama")
    line = ["run", model, "train.txt", "--codebook", "trellis", *SMALL, "--wbits", "1.5"]
    line += ["--tile", "8x16", "--nsamples", "4", "--seqlen", "16", "--device", "cpu"]
    line += ["--eval_datasets", "test.txt"]
    status, _, [error] = quip(*line, "--tile", "8x20")
    assert status == 2
    assert "self_attn.q_proj: its 32 inputs are no multiple of 20" in error
    assert quip(*line, "--save", "packed", "--out", "out")[0] == 0
    run = json.loads((folder / "out" / "run.json").read_text())
    assert run["flags"]["wbits"] == run["recipe"]["codebook"]["bits"] == 1.5
    status, out, _ = quip("inspect", "packed", "--verify", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["codebook"]["kind"] == "trellis"
    assert found["codebook"]["bits"] == 1.5
    assert found["bits_per_weight"] == run["totals"]["bits_per_weight"]
    assert "rounded to 1.5 bits each" in (folder / "packed" / "README.md").read_text()
    words = ("--datasets", "test.txt", "--seqlen", "16", "--out", "again")
    assert quip("evaluate", "packed", *words)[0] == 0
    again = json.loads((folder / "again" / "run.json").read_text())
    assert again["perplexity"] == run["perplexity"]
