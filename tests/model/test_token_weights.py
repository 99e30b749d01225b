"""Tokens that weigh what the loss feels of them: H = sum s x x^T / sum s, everywhere."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quip.matrix.build import build_recipe
from quip.model.block import Block
from quip.model.matrices import covered
from quip.model.quantize import quantize_matrix_by_matrix
from quip.model.run import Run
from quip.model.sensitivity.found import Sensitivity
from quip.model.sensitivity.gather import measure_sensitivity
from quip.model.sensitivity.measure import Passing
from quip.model.team import ALONE, Team
from quip.model.walk import walk
from quip.packed.digests import bytes_of
from quip.packed.experts import unfuse
from tests.support.mixtures import mixture
from tests.support.processes import in_team
from tests.support.tiny import tiny, tokens

BATCH = 2
CPU = torch.device("cpu")
RECIPES = {
    "lattice in stacks": build_recipe(codebook="E8P12"),
    "lattice, outputs rescaled": build_recipe(codebook="E8P12", pre_rescale_out=True),
    "incoherent, outputs rescaled": build_recipe(
        wbits=2, incoh_processing=True, pre_rescale_out=True
    ),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny("llama"),
    "opt": lambda: tiny("opt"),
    "qwen3-moe": lambda: mixed("qwen3-moe"),
}


def mixed(name: str, **options: Any) -> nn.Module:
    model = mixture(name, **options)
    unfuse(model)
    return model


def felt_of(model: nn.Module, team: Team = ALONE, kind: str = "fisher") -> Sensitivity | None:
    passing = Passing(kind=kind, seed=0, device=CPU, batch_size=BATCH, team=team)
    return measure_sensitivity(model, tokens(), passing)


def alike(felt: Sensitivity) -> Sensitivity:
    """The same, of tokens that all weigh 1."""
    windows = {
        key: x if key.startswith("sent") else torch.ones_like(x) for key, x in felt.windows.items()
    }
    sums = dict(felt.sums)
    for key in [key for key in sums if key.startswith("means")]:
        sums[key] = torch.ones_like(sums[key])
        if "experts" in key:
            sums[key][-1] = 2  # a token is sent to so many
    return replace(felt, windows=windows, sums=sums)


def quantized(
    model: nn.Module, recipe: str, felt: Sensitivity | None, team: Team = ALONE, *, weighs: bool
) -> tuple[str, list[dict[str, Any]]]:
    run = Run(
        recipe=RECIPES[recipe],
        seed=0,
        device=CPU,
        batch_size=BATCH,
        team=team,
        felt=felt,
        weighs=weighs,
    )
    records = list(quantize_matrix_by_matrix(model, tokens(), run))
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + bytes_of(tensor))
    return digest.hexdigest(), [asdict(record) | {"seconds": 0} for record in records]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_that_weigh_the_same_leave_all_bits_as_they_are(name):
    felt = felt_of(MODELS[name]())
    assert felt
    plain, records = quantized(MODELS[name](), "lattice in stacks", None, weighs=False)
    same, weighed = quantized(MODELS[name](), "lattice in stacks", alike(felt), weighs=True)
    other, _ = quantized(MODELS[name](), "lattice in stacks", felt, weighs=True)
    assert same == plain
    assert other != plain
    for before, after in zip(records, weighed, strict=True):
        assert after["plain_loss"] == after["proxy_loss"] == before["proxy_loss"]
        assert before["plain_loss"] is before["damage"] is None


@torch.no_grad()
def inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """x of every matrix on all tokens, in float64, by one hook each."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: found.update({name: args[0].double().flatten(0, -2)})

    hooks = [m.module.register_forward_pre_hook(hook(m.name)) for m in covered(model)]
    model(input_ids=ids, use_cache=False)
    for one in hooks:
        one.remove()
    return found


def observed(model: nn.Module, felt: Sensitivity) -> dict[str, tuple[Block, Any]]:
    blocks = walk(model, tokens(), device="cpu", batch_size=BATCH)
    return {
        name: (block, hessian)
        for block in blocks
        for name, hessian in block.observe_each([felt])[0].items()
    }


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_hessians_are_weighted_means_of_x_xT(name):
    model = tiny(name)
    felt = felt_of(model)
    assert felt
    expected = inputs(model, tokens())
    found = observed(model, felt)
    weights = {
        id(hessian): felt.windows[f"tokens {matrix}"].double().flatten()
        for matrix, (_, hessian) in found.items()
        if f"tokens {matrix}" in felt.windows
    }
    for matrix, (_, hessian) in found.items():
        s = weights[id(hessian)]
        x = expected[matrix]
        H = (x.T * s) @ x / s.sum()
        error = (hessian.value() - H).abs().max()
        assert error < 1e-5 * H.abs().max()  # products and sums in float32
        torch.testing.assert_close(
            hessian.mean(), (s @ x) / s.sum(), rtol=1e-5, atol=float(1e-5 * x.abs().max())
        )


def test_experts_see_the_tokens_that_they_were_sent_by_what_the_loss_feels_there():
    model = mixed("qwen3-moe", dtype=torch.float64)
    felt = felt_of(model)
    assert felt
    x = {}
    hooks = [
        matrix.module.register_forward_pre_hook(
            lambda _, args, name=matrix.name: x.setdefault(name, []).append(args[0].detach())
        )
        for matrix in covered(model)
        if "experts" in matrix.name
    ]
    with torch.no_grad():
        for ids in tokens().split(BATCH):
            model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    checked = 0
    for matrix, (_, hessian) in observed(model, felt).items():
        if matrix not in x or hessian.is_short:
            continue
        owner, expert, part = matrix.rsplit(".", 2)
        sent, slots = felt.windows[f"sent {owner}"], felt.windows[f"slots {owner}.{part}"]
        weights = [
            s.flatten(0, 1).T[int(expert) == chosen.flatten(0, 1).T]  # slot by slot
            for s, chosen in zip(slots.split(BATCH), sent.split(BATCH), strict=True)
        ]
        rows, s = torch.cat(x[matrix]), torch.cat(weights).double()
        H = (rows.T * s) @ rows / s.sum()
        assert (hessian.summed().value() - H).abs().max() < 1e-5 * H.abs().max()
        checked += 1
    assert checked > 4


def test_a_record_has_the_loss_of_all_tokens_alike_too_and_the_damage():
    felt, model, original = felt_of(tiny("llama")), tiny("llama"), tiny("llama")
    assert felt
    _, records = quantized(model, "lattice in stacks", felt, weighs=True)
    x = inputs(original, tokens())
    for record in records[:4]:  # of the first block, whose inputs are those of the original
        if record["name"].endswith("o_proj"):
            continue
        name, m = record["name"], record["rows"]
        W = original.get_submodule(name).weight.detach().double()
        packed = model.get_submodule(name)
        E = packed.dequantize().double() - W
        first = f"tokens {name.replace('k_proj', 'q_proj').replace('v_proj', 'q_proj')}"
        s = felt.windows[first].double().flatten()
        plain, size = (x[name] @ E.T).square().sum(1), (x[name] @ W.T).square().sum(1)
        # H is rounded to float32.
        assert record["plain_loss"] == pytest.approx(float(plain.sum() / size.sum()), rel=1e-4)
        assert record["proxy_loss"] == pytest.approx(
            float((s * plain).sum() / (s * size).sum()), rel=1e-4
        )
        square = felt.sums[f"squares {name}"]
        expected = 0.5 / m * square * (s * plain).sum() / s.sum()
        assert record["damage"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("qwen3-moe", "lattice, outputs rescaled"),
        ("opt", "incoherent, outputs rescaled"),
    ],
)
def test_several_processes_make_what_one_does(name, recipe):
    def job(team: Team) -> tuple[str, list[dict[str, Any]]]:
        felt = felt_of(MODELS[name](), team)
        return quantized(MODELS[name](), recipe, felt, team, weighs=True)

    assert in_team(2, job) == [job(ALONE)] * 2
