"""Plans: which recipe each matrix gets, and models that are quantized by two of them."""

import pytest
import torch

from quip.errors import UsageError
from quip.matrix.build import build_recipe
from quip.matrix.recipe import describe
from quip.model.matrices import coverage
from quip.model.plan import Plan, Rule, by_recipe, described
from quip.model.quantize import quantize_model
from quip.packed.stack import StackedLinear, stacks
from tests.support.tiny import tiny, tokens

TWO = build_recipe(wbits=2, incoh_processing=True)
FOUR = build_recipe(wbits=4, quant="gptq")
SHARP = build_recipe(codebook="E8P12")
NAMES = [f"model.layers.{i}.{x}" for i in range(2) for x in ("attn.q_proj", "attn.v_proj", "down")]


def plan(*rules: tuple, default=TWO) -> Plan:
    return Plan(rules=tuple(Rule(*rule) for rule in rules), default=default)


def quantized(how, name: str = "llama"):
    model = tiny(name)
    return model, quantize_model(model, tokens(), how, device="cpu", seed=0)


def test_the_first_pattern_that_matches_counts_and_the_default_is_for_the_rest():
    found = plan(("*.v_proj", FOUR), ("model.layers.0.*", SHARP)).recipes(NAMES)
    assert list(found) == NAMES
    assert [found[name] for name in NAMES] == [SHARP, FOUR, SHARP, TWO, FOUR, TWO]


def test_a_recipe_is_a_plan_and_a_plan_stays_itself():
    assert Plan.of(TWO).recipes(NAMES) == dict.fromkeys(NAMES, TWO)
    own = plan(("*", FOUR))
    assert Plan.of(own) is own


def test_a_pattern_of_nothing_is_refused_with_the_closest_names():
    with pytest.raises(UsageError, match=r"'\*\.w_proj' matches no matrix of the model, .*v_proj"):
        plan(("*.w_proj", FOUR)).recipes(NAMES)


def test_a_pattern_that_those_before_it_leave_nothing_is_refused():
    with pytest.raises(UsageError, match=r"'\*\.v_proj' matches no matrix that those before it"):
        plan(("*proj", FOUR), ("*.v_proj", SHARP)).recipes(NAMES)


def test_matrices_without_a_recipe_are_refused_by_name():
    with pytest.raises(UsageError, match=r"matches model.layers.0.down, .*1.down; add one, or"):
        plan(("*proj", FOUR), default=None).recipes(NAMES)
    with pytest.raises(UsageError, match=r"layers\.0\.down and 3 more; add one"):
        plan(("*.1.attn.*", FOUR), default=None).recipes([*NAMES, "b", "c"])


def test_a_recipe_is_described_as_ever_and_a_plan_beside_its_default():
    assert described(TWO) == {"recipe": describe(TWO)} == described(Plan.of(TWO))
    assert described(None) == {"recipe": None}
    found = described(plan(("*.v_proj", FOUR), default=None))
    assert found["recipe"] is None
    assert found["plan"] == {"patterns": ["*.v_proj"], "recipes": {"*.v_proj": describe(FOUR)}}


def test_names_of_equal_recipes_come_together():
    recipes = {"q": TWO, "k": FOUR, "v": build_recipe(wbits=2, incoh_processing=True)}
    assert by_recipe("qkv", recipes) == [["q", "v"], ["k"]]


def test_each_matrix_gets_the_codes_of_its_own_recipe():
    """Those of block 0, whose inputs are the same whatever the others have become."""
    model, records = quantized(plan(("*.v_proj", FOUR)))
    alone = {how: quantized(how)[0] for how in (TWO, FOUR)}
    assert [record.name for record in records[:3]] == [
        f"model.layers.0.self_attn.{x}_proj" for x in "qkv"
    ]
    for name in coverage(tiny("llama")).quantized:
        how = FOUR if name.endswith("v_proj") else TWO
        layer = model.get_submodule(name)
        assert layer.spec.codebook["bits"] == how.codebook.bits
        if ".0.self_attn." in name and "o_proj" not in name:
            assert torch.equal(layer.codes, alone[how].get_submodule(name).codes)


def test_a_plan_of_one_recipe_is_that_recipe():
    model, records = quantized(plan(("*.v_proj", TWO)))
    other, expected = quantized(TWO)
    assert [(r.name, r.proxy_loss) for r in records] == [(r.name, r.proxy_loss) for r in expected]
    state, theirs = model.state_dict(), other.state_dict()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], theirs[name]) for name in state)


def test_only_matrices_of_one_recipe_are_stacked():
    model, _ = quantized(plan(("*.k_proj", FOUR), ("*.gate_proj", TWO), default=SHARP))
    ends = [[name.rpartition(".")[2] for name in members] for members in stacks(model)]
    assert ends == [["q_proj", "v_proj"]] * 4
    up = model.get_submodule("model.layers.0.mlp.up_proj")
    assert not isinstance(up, StackedLinear)
    assert up.spec.codebook["kind"] == "lattice"


def test_a_recipe_that_cannot_do_its_matrix_names_it():
    model = tiny("llama")
    narrow = plan(("*.down_proj", build_recipe(codebook="E8P12", hadamard_block=20)))
    with pytest.raises(UsageError, match=r"^model\.layers\.0\.mlp\.down_proj: "):
        quantize_model(model, tokens(), narrow, device="cpu", seed=0)
    assert not stacks(model)
