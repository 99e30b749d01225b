"""Fine-tuning by several processes: bit for bit what one makes, whoever has which windows."""

import copy
from dataclasses import replace

import pytest
import torch

from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.model.team import Team
from quip.model.tune import BlockTuner, BlockTuning, ModelTuning, tune_model
from quip.model.tune.dealt import Gradients, by_number, by_place, turns
from quip.model.walk import walk
from quip.packed.linear import QuantizedLinear
from tests.support.teams import together
from tests.support.tiny import tokens
from tests.support.tuning import LATTICE, quantized, short, state

VECTORS = build_recipe(wbits=2, codebook="vq", vq_dim=2, groupsize=256, columns_per_group=16)
RECIPES = {"E8P12": LATTICE, "vq": VECTORS}
# Windows a step, and processes. Steps of one window leave some idle; of seven, one has more.
CASES = [("E8P12", 1, 2), ("E8P12", 7, 3), ("vq", 2, 2)]
WHOLE = ModelTuning(lr=1e-3, signs_lr=1e-2, epochs=2)
BLOCKS = BlockTuning(lr=1e-3, signs_lr=3e-3, batch_size=4, epochs=2)


@pytest.mark.parametrize(("recipe", "step", "size"), CASES)
def test_a_whole_model_is_tuned_to_the_same_bits(recipe, step, size):
    student = quantized(recipe=RECIPES[recipe])[0]

    def tuned(team: Team):
        model, asked = copy.deepcopy(student), replace(WHOLE, batch_size=step)
        record = tune_model(model, short(), tokens(15), asked, device="cpu", seed=0, team=team)
        return state(model), replace(record, seconds=0.0)

    expected, record = tuned(Team())
    assert record.improved
    for found, told in together(size, tuned):
        assert told == record
        assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("size", [2, 3])
def test_a_block_is_tuned_to_the_same_bits_where_its_windows_are(size):
    windows, batch_size = tokens(11), 2  # the sixth batch has one window

    def tuned(team: Team):
        own = team.share(windows, batch_size)
        block = next(iter(walk(short(), own, device="cpu", batch_size=batch_size)))
        tuner = BlockTuner(block, BLOCKS, seed=0, team=team)
        name, matrix = next(iter(block.matrices().items()))
        W = matrix.weight.detach()
        rng = torch.Generator().manual_seed(0)
        made = quantize_matrix(W, torch.eye(W.shape[1]), LATTICE, rng=rng)
        block.replace(name, QuantizedLinear.from_matrix(made, None))
        return tuner.tune([name]), state(block.module)

    record, expected = tuned(Team())
    assert record.loss_after < record.loss_before
    for told, found in together(size, tuned):
        assert replace(told, seconds=0.0) == replace(record, seconds=0.0)
        assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_a_turn_has_one_batch_of_a_process():
    team = Team(0, 3)
    assert by_place(team)([7, 5, 2, 9]) == [0, 1, 2, 0]
    assert by_number(team)([7, 5, 2, 9]) == [1, 2, 2, 0]
    assert [[*range(9)[turn]] for turn in turns([1, 2, 2, 0, 1, 2, 0, 0])] == [
        [0, 1],
        [2, 3, 4],
        [5, 6],
        [7],
    ]


def test_sums_of_gradients_have_the_order_of_the_step_and_none_where_there_was_none():
    """1 + 2^24 - 2^24 is 1 in float32 in one order of three, and 0 in another."""
    terms = {0: -(2.0**24), 1: 2.0**24, 2: 1.0}

    def summed(team: Team):
        weights = [torch.nn.Parameter(torch.zeros(5)) for _ in range(3)]
        weights[0].grad = torch.full((5,), terms[team.rank])
        if team.rank == 1:
            weights[1].grad = torch.full((5,), -0.0)
        gradients = Gradients(weights, team)
        gradients.add([1, 0, 2])
        gradients.put()
        return [weight.grad for weight in weights]

    for first, second, third in together(3, summed):
        assert first.tolist() == [1.0] * 5
        assert torch.equal(second.signbit(), torch.ones(5, dtype=torch.bool))
        assert third is None
