"""The command line of QuIP#: named recipes, lattices and their bits, fine-tuning."""

import json

import pytest

from quip import cli
from quip import run as door
from quip.codebooks import LATTICES
from quip.matrix.build import build_recipe
from quip.matrix.methods import METHODS, RECIPES
from quip.matrix.said import as_line
from quip.model.tune import BlockTuning

pytestmark = pytest.mark.usefixtures("command")


def test_recipes_and_methods_are_listed_with_their_flags(capsys):
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert name in out
        assert recipe.title in out
        assert " ".join(as_line(recipe.every)) in out
    assert cli.main(["recipes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    recipes = {n: {"title": r.title, "flags": r.every} for n, r in RECIPES.items()}
    methods = {n: {"title": m.title, "flags": {"quant": n}} for n, m in METHODS.items()}
    assert found == recipes | methods
    assert all(m.title in out for m in METHODS.values())


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_recipe_is_its_flags(asked, name):
    e = asked(["demo", "pydoc", "--recipe", name])
    assert e.recipe == build_recipe(**RECIPES[name].flags)
    assert e.flags["wbits"] == RECIPES[name].flags["wbits"]


def test_flags_on_the_line_win_over_those_of_a_recipe(asked, folder):
    line = ["demo", "pydoc", "--recipe", "quip-sharp-2bit", "--quant", "gptq", "--npasses", "1"]
    assert asked(line).recipe == build_recipe(codebook="E8P12", quant="gptq", npasses=1)
    (folder / "a.yaml").write_text("recipe: quip-sharp-3bit\nrange: tensor\n")
    found = asked(["demo", "pydoc", "--config", "a.yaml"]).recipe
    assert found == build_recipe(codebook="E8P12RVQ3B", range_="tensor")


@pytest.mark.parametrize(("codebook", "bits"), [(name, row.bits) for name, row in LATTICES.items()])
def test_a_lattice_brings_its_bits(asked, codebook, bits):
    e = asked(["demo", "pydoc", "--codebook", codebook])
    assert e.flags["wbits"] == bits
    assert e.recipe == build_recipe(codebook=codebook)
    assert e.method == f"ldlq, {codebook} ({bits} bits)"


def test_flags_of_lattices_become_plain_values(asked):
    line = (
        "demo pydoc --codebook E8P12RVQ4B --rotation hadamard --hadamard_block 128 --range tensor "
        "--scale_override 0.9 --resid_scale_override 3.8 --no_fuse --npasses 3"
    )
    assert asked(line.split()).recipe == build_recipe(
        codebook="E8P12RVQ4B",
        rotation="hadamard",
        hadamard_block=128,
        range_="tensor",
        scale_override=0.9,
        resid_scale_override=3.8,
        no_fuse=True,
        npasses=3,
    )


def test_tuning_is_off_unless_asked_for(asked):
    line = ["demo", "pydoc", "--codebook", "E8P12"]
    assert asked(line).tuning is None
    e = asked([*line, "--ft_epochs", "3", "--ft_lr", "1e-4", "--ft_held_out", "0.5"])
    assert e.tuning == BlockTuning(epochs=3, lr=1e-4, held_out=0.5)
    assert e.method == "ldlq, E8P12 (2 bits), fine-tuned"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--recipe zork", "--recipe 'zork': not one of quip-2bit, quip-3bit"),
        ("--recipe quip-sharp-2bit --wbits 3", "--wbits 3: E8P12 has 2 bits"),
        ("--codebook E8P12 --wbits 16", "--wbits 16: E8P12 has 2 bits"),
        ("--codebook E8P12 --qfn b", "--qfn b speaks of integer grids: say --codebook int"),
        ("--ft_lr 0.1 --wbits 2", "--ft_lr speaks of fine-tuning: add --ft_epochs N"),
        ("--ft_epochs 2", "--ft_epochs needs weights to quantize"),
        ("--ft_epochs -1 --wbits 2", "epochs -1"),
        ("--ft_epochs 1 --ft_held_out 1.5 --wbits 2", "held_out 1.5"),
        ("--target_shrink 2 --wbits 2", "'2' is no share: a number from 0 to 1 is needed, or auto"),
        ("--target_shrink half --wbits 2", "invalid number or auto value: 'half'"),
        ("--target_shrink auto", "--target_shrink auto needs weights to quantize"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, line, reason):
    assert door.main(["demo", "pydoc", *line.split()]) == 2
    (found,) = capsys.readouterr().err.splitlines()
    assert reason in found
