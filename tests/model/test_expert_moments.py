"""Second moments of experts, against float64 sums over the tokens that each was sent."""

import copy
from dataclasses import dataclass, field, replace
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn

from quip.errors import NonFinite
from quip.matrix.build import build_recipe
from quip.matrix.hessian import Hessian
from quip.model.quantize import quantize_matrix_by_matrix
from quip.model.records import MatrixRecord
from quip.model.run import Run
from quip.model.team import ALONE, Team
from quip.model.walk import walk
from quip.packed.digests import bytes_of
from quip.packed.experts import Experts, unfuse
from tests.support.mixtures import MIXTURES, mixture
from tests.support.processes import in_team
from tests.support.tiny import tokens

RECIPE = build_recipe(wbits=4, incoh_processing=True)


@dataclass
class Seen:
    """The inputs of a layer's experts, by number and matrix, and of all of them together."""

    experts: Experts
    sent: dict[str, list[Tensor]] = field(default_factory=dict)
    all: list[Tensor] = field(default_factory=list)


def unfused(name: str) -> nn.Module:
    model = mixture(name)
    unfuse(model)
    return model


@torch.no_grad()
def see(model: nn.Module, ids: Tensor) -> dict[str, Seen]:
    """What hooks on each module see in one pass through the whole model, in float64."""
    found: dict[str, Seen] = {}
    hooks = []
    for name, experts in model.named_modules():
        if not isinstance(experts, Experts):
            continue
        seen = found[name] = Seen(copy.deepcopy(experts).double())
        hook = lambda _, args, seen=seen: seen.all.append(args[0].double())  # noqa: E731
        hooks.append(experts.register_forward_pre_hook(hook))
        for part, linear in experts.named_modules():
            if isinstance(linear, nn.Linear):
                kept = seen.sent[part] = []
                hook = lambda _, args, kept=kept: kept.append(args[0].double())  # noqa: E731
                hooks.append(linear.register_forward_pre_hook(hook))
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def mean_of_squares(x: Tensor) -> Tensor:
    return (x[:, :, None] * x[:, None, :]).mean(0)


@torch.no_grad()
def oracle(model: nn.Module, ids: Tensor, *, all_experts: bool) -> dict[str, tuple[int, Tensor]]:
    """Tokens that each expert's matrix saw, and its H by the rule of `quip.model.experts`."""
    found = {}
    for name, seen in see(model, ids).items():
        everything = torch.cat(seen.all)
        everything = everything[everything.any(-1)]  # Llama 4 hands a zero to who was not chosen
        for part, kept in seen.sent.items():
            x, expert = torch.cat(kept), int(part.partition(".")[0])
            pool = everything
            if part.endswith("down_proj"):
                pool = seen.experts.between(expert, everything)
            n, c = x.shape[1], len(x)
            H_pool, H = mean_of_squares(pool), mean_of_squares(x)
            if all_experts:
                H = H_pool
            elif c < n:
                H = (c * H + (n - c) * H_pool) / n
            found[f"{name}.{part}"] = c, H
    return found


@pytest.mark.parametrize(("windows", "all_experts"), [(4, False), (20, False), (4, True)])
@pytest.mark.parametrize("name", MIXTURES)
def test_moments_of_experts_are_those_of_the_tokens_sent_filled_up_by_all(
    name, windows, all_experts
):
    model, ids = unfused(name), tokens(windows)
    expected = oracle(model, ids, all_experts=all_experts)
    assert any((count < len(H)) == (windows == 4) for count, H in expected.values())
    for block in walk(model, ids, device="cpu", batch_size=3):
        hessians = block.observe(all_experts=all_experts)
        assert list(hessians) == list(block.matrices())
        for matrix in hessians.keys() & expected.keys():
            count, H = expected.pop(matrix)
            assert hessians[matrix].count == count
            # Products and sums of at most 240 tokens in float32, relative to the largest entry.
            error = (hessians[matrix].summed().value() - H).abs().max()
            assert error < 1e-5 * H.abs().max()
    assert not expected


def test_moments_do_not_depend_on_what_was_replaced_meanwhile():
    model = unfused("mixtral")
    block = next(walk(model, tokens(), device="cpu", batch_size=3))
    hessians = block.observe()
    before = {name: hessian.summed().value() for name, hessian in hessians.items()}
    for name, matrix in block.matrices().items():
        if ".experts." in name:
            block.replace(name, nn.Linear(matrix.columns, matrix.rows, bias=False))
    for name, hessian in hessians.items():
        assert torch.equal(hessian.summed().value(), before[name])


def test_no_moments_of_experts_are_held(monkeypatch):
    held: WeakSet[Hessian] = WeakSet()
    made = Hessian.__init__
    monkeypatch.setattr(
        Hessian, "__init__", lambda x, *args, **k: held.add(x) or made(x, *args, **k)
    )
    hessians = next(walk(unfused("mixtral"), tokens(4), device="cpu")).observe()
    dense = {id(x) for name, x in hessians.items() if ".experts." not in name}
    assert len(held) == len(dense) == 2
    for hessian in hessians.values():
        hessian.summed()
    assert len(held) == len(dense) + 1  # of all experts' first matrices, on all tokens


def idle(model: nn.Module, expert: int) -> None:
    """Let no router choose this expert."""
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias[expert] = -100


def test_an_expert_that_no_token_reached_is_calibrated_on_all(caplog):
    models = [unfused("deepseek-v3") for _ in range(2)]
    for model in models:
        idle(model, 2)
    name = "model.layers.0.mlp.experts.2.down_proj"
    found, pooled = (
        next(walk(model, tokens(), device="cpu")).observe(all_experts=all_experts)[name]
        for model, all_experts in zip(models, (False, True), strict=True)
    )
    assert found.count == pooled.count == 0
    assert torch.equal(found.summed().value(), pooled.summed().value())
    run = Run(recipe=RECIPE, seed=0, device="cpu")
    counts = {x.name: x.tokens for x in quantize_matrix_by_matrix(models[0], tokens(), run)}
    assert counts[name] == 0
    assert counts["model.layers.0.mlp.shared_experts.down_proj"] is None
    assert sum(count for x, count in counts.items() if x.endswith("0.gate_up_proj")) > 0
    lines = [x.getMessage() for x in caplog.records if "saw fewer tokens" in x.getMessage()]
    assert [line.partition(":")[0] for line in lines] == ["model.layers.0", "model.layers.1"]
    assert "4 of the 8 matrices" in lines[0]  # the other of its group is not chosen either
    assert "(4 none at all)" in lines[0]


def test_a_team_makes_of_experts_the_bits_that_one_process_does():
    def quantized(team: Team = ALONE) -> tuple[dict[str, bytes], list[MatrixRecord]]:
        model = unfused("deepseek-v3")
        idle(model, 2)
        run = Run(recipe=RECIPE, seed=0, device="cpu", batch_size=3, team=team)
        records = list(quantize_matrix_by_matrix(model, tokens(), run))
        tensors = {name: bytes(bytes_of(x)) for name, x in model.state_dict().items()}
        return tensors, [replace(record, seconds=0.0) for record in records]

    assert in_team(2, quantized) == [quantized()] * 2


def test_inputs_of_experts_that_are_not_finite_are_named():
    model = unfused("mixtral")
    model.model.layers[0].mlp.experts[1].gate_up_proj.weight.data.fill_(1e38)
    hessians = next(walk(model, tokens(), device="cpu")).observe()
    culprit = "model.layers.0.mlp.experts.1.down_proj"
    with pytest.raises(NonFinite, match=rf"^{culprit}: NaN or infinity among its inputs"):
        hessians.pop(culprit).summed()
    for hessian in hessians.values():
        hessian.summed()
