"""What the loss feels: gradients at the outputs of matrices, as autograd has them."""

import pytest
import torch
from torch import Tensor, nn

from quip.errors import NonFinite, UsageError
from quip.model.activations import Activations
from quip.model.matrices import covered
from quip.model.sensitivity.found import Sensitivity
from quip.model.sensitivity.gather import measure_sensitivity, share
from quip.model.sensitivity.labels import SCALE, gradient_at_logits, rng_of_window, sample
from quip.model.sensitivity.measure import Passing
from quip.model.team import ALONE, Team
from quip.packed.experts import unfuse
from tests import reference_sensitivity as ref
from tests.support.mixtures import mixture
from tests.support.processes import in_team
from tests.support.tiny import SEQLEN, tiny, tokens

BATCH = 2  # windows of a unit; of seven windows the last unit has one


def measured(
    model: nn.Module, ids: Tensor | None = None, *, team: Team = ALONE, **how: object
) -> Sensitivity:
    options = {"kind": "labels", "seed": 0, "batch_size": BATCH, **how}
    passing = Passing(device=torch.device("cpu"), team=team, **options)
    found = measure_sensitivity(model, tokens() if ids is None else ids, passing)
    shared = share(found, team, passing.batch_size)
    assert shared is not None
    return shared


def same(one: Sensitivity, other: Sensitivity) -> bool:
    pairs = ((one.windows, other.windows), (one.sums, other.sums))
    return all(
        a.keys() == b.keys() and all(torch.equal(x, b[key]) for key, x in a.items())
        for a, b in pairs
    )


def of_autograd(model: nn.Module, ids: Tensor) -> dict[str, list[list[ref.Gradient]]]:
    """By matrix, the gradients of each window, for the labels of the data."""
    modules = {matrix.name: matrix.module for matrix in covered(model)}
    found = [ref.gradients(model, modules, window, window[1:]) for window in ids]
    return {name: [window[name] for window in found] for name in modules}


def input_of(matrix: str) -> str:
    """The first matrix that its input feeds, in the order that they are called in."""
    for own, first in (
        ("attn.k_proj", "attn.q_proj"),
        ("attn.v_proj", "attn.q_proj"),
        ("mlp.up_proj", "mlp.gate_proj"),
        ("mlp.fc_in", "attn.q_proj"),  # GPT-J has it beside attention
    ):
        matrix = matrix.replace(own, first)
    return matrix


@pytest.mark.parametrize("name", ["opt", "llama", "gptj"])
def test_what_is_felt_are_squares_of_the_gradients_of_autograd(name):
    model, ids = tiny(name, dtype=torch.float64), tokens()
    found, expected = measured(model, ids), of_autograd(model, ids)
    weights = dict.fromkeys(found.windows, torch.zeros(ids.shape).double())
    for matrix, windows in expected.items():
        x = torch.cat([call.x for (call,) in windows])
        g = torch.cat([call.g for (call,) in windows])
        f = (x.square().sum(1)[:, None] * g.square()).sum(0) / ids.numel()
        # GPT-J's attention is in float32 whatever the dtype of the model.
        torch.testing.assert_close(found.outputs([matrix])[matrix], f, rtol=1e-6, atol=0)
        s = g.square().sum(1).view(ids.shape)
        torch.testing.assert_close(found.sums[f"squares {matrix}"], s.sum() / ids.numel())
        key = f"tokens {input_of(matrix)}"
        weights[key] = weights[key] + s
    for key, s in found.windows.items():  # which are kept in float32
        torch.testing.assert_close(s.double(), weights[key], rtol=1e-6, atol=0)
        assert not s[:, -1].any()  # which has no label
        mean = found.sums[f"means {key.removeprefix('tokens ')}"]
        assert mean == s.mean(dtype=torch.float64)


def test_the_oracle_has_the_gradient_of_the_weights_too():
    """sum_t g_t^T W x_t = <dL/dW, W>."""
    model, ids = tiny("llama", dtype=torch.float64), tokens(1)
    for name, windows in of_autograd(model, ids).items():
        W = model.get_submodule(name).weight
        ((call,),) = windows
        expected = (W.grad * W).sum()
        torch.testing.assert_close((call.g * (call.x @ W.T)).sum(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_tokens_of_experts_weigh_what_those_feel_that_the_router_sent_them_to(name):
    model, ids = mixture(name, dtype=torch.float64), tokens(3)
    unfuse(model)
    found, expected = measured(model, ids), of_autograd(model, ids)
    for key, slots in found.windows.items():
        what, _, matrix = key.partition(" ")
        if what != "slots":
            continue
        owner, _, part = matrix.rpartition(".")
        sent = found.windows[f"sent {owner}"]
        assert slots.shape == sent.shape == (3, SEQLEN, 2)
        for expert in range(4):
            windows = expected[f"{owner}.{expert}.{part}"]
            # Rows come slot by slot, and in each by token.
            felt = [s.T[expert == chosen.T] for s, chosen in zip(slots, sent, strict=True)]
            for own, calls in zip(felt, windows, strict=True):
                assert len(own) == sum(len(call.x) for call in calls)
                for call in calls:
                    torch.testing.assert_close(
                        own.double(), call.g.square().sum(1), rtol=1e-6, atol=0
                    )


def test_labels_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).double()
    uniform = (torch.arange(1000).double() + 0.5) / 1000
    drawn = sample(p.expand(1000, 4), uniform)
    assert torch.bincount(drawn, minlength=4).tolist() == [500, 0, 300, 200]


def test_gradients_at_the_logits_have_mean_zero_over_drawn_labels():
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double()
    ids, rounds = torch.zeros(5, dtype=torch.long), 4000
    mean, square = torch.zeros(5, 8).double(), torch.zeros(5, 8).double()
    for seed in range(rounds):
        rng = rng_of_window(seed, 0)
        g = gradient_at_logits(logits, ids, kind="fisher", rng=rng) / SCALE
        mean, square = mean + g / rounds, square + g.square() / rounds
    assert not mean[-1].any()  # it has no label
    error = (square[:-1] / rounds).sqrt()
    assert (mean[:-1].abs() < 5 * error).all()  # of 32 numbers
    p = logits[:-1].softmax(-1)
    torch.testing.assert_close(square[:-1], p * (1 - p), rtol=0.2, atol=0)  # the Fisher's diagonal


def test_labels_of_a_window_do_not_depend_on_the_windows_beside_it():
    whole, parts = (measured(tiny("llama"), kind="fisher", batch_size=size) for size in (7, 1))
    for key, s in whole.windows.items():  # products of other sizes differ in their last digits
        torch.testing.assert_close(parts.windows[key], s, rtol=1e-3, atol=1e-5)
    assert not same(whole, measured(tiny("llama"), kind="fisher", batch_size=7, seed=1))
    assert same(whole, measured(tiny("llama"), kind="fisher", batch_size=7))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("made", [lambda: tiny("llama"), lambda: mixed("qwen3-moe")])
def test_a_team_feels_bitwise_what_one_process_does(size, made):
    alone = measured(made(), kind="fisher")

    def job(team: Team) -> bool:
        own = measured(made(), kind="fisher", team=team)
        shared = {key: team.share(x, BATCH) for key, x in alone.windows.items()}
        return same(own, Sensitivity(kind="fisher", windows=shared, sums=alone.sums))

    assert in_team(size, job) == [True] * size


def mixed(name: str) -> nn.Module:
    model = mixture(name)
    unfuse(model)
    return model


def test_chunks_of_windows_change_nothing(monkeypatch):
    """As where the blocks come from elsewhere, and few windows at once have room."""
    whole = measured(tiny("llama"))
    monkeypatch.setattr("quip.model.sensitivity.measure._windows_at_once", lambda *_: 2 * BATCH)
    assert same(measured(tiny("llama"), activations=Activations(1)), whole)  # in a file


def test_the_pass_leaves_the_model_as_it_was():
    model = tiny("opt")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    measured(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_has_no_gradient_is_not_felt():
    """As an indexer, which only chooses what attention sees."""
    model = tiny("llama")
    q_proj = model.model.layers[0].self_attn.q_proj
    q_proj.forward = torch.no_grad()(q_proj.forward)
    found = measured(model)
    felt = found.outputs([f"model.layers.0.self_attn.{x}_proj" for x in "qkv"])
    assert [bool(f.any()) for f in felt.values()] == [False, True, True]
    assert not found.squares(["model.layers.0.self_attn.q_proj"]).popitem()[1].any()


def test_gradients_that_are_not_finite_are_named():
    model = tiny("llama")
    model.lm_head.weight.data[3] = torch.inf
    with pytest.raises(NonFinite, match=r"layers\.0\.self_attn\.q_proj: NaN .* --token_weights"):
        measured(model)


def test_labels_of_no_kind_are_refused():
    with pytest.raises(UsageError, match=r"--token_weights 'fischer': say fisher or labels"):
        measured(tiny("opt"), kind="fischer")
