"""Matrices and recipes in company: what each gives alone, and no work twice."""

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quip import transforms
from quip.codebooks import MinMaxGrid
from quip.errors import NonFinite, NotPositiveDefinite
from quip.matrix import feedback
from quip.matrix.build import METHODS, build_recipe
from quip.matrix.order import backwards, natural
from quip.matrix.quantize import quantize_by_many, quantize_matrices, quantize_matrix
from quip.matrix.seeds import rng_for
from tests.support.matrices import failing, plain, quantized

INCOHERENT = {"incoh_processing": True}


# Seeds and company


def test_the_generator_of_a_matrix_depends_on_seed_and_name_alone():
    def draw(seed: int, name: str) -> int:
        return int(torch.randint(2**60, (), generator=rng_for(seed, name)))

    assert draw(0, "a") == draw(0, "a")
    assert len({draw(seed, name) for seed in range(3) for name in "abc"}) == 9
    # Pinned: a run that is resumed by another version must draw the same rotations.
    assert rng_for(0, "model.layers.0.q_proj").initial_seed() == 6373944502311183807


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("flags", [{}, INCOHERENT], ids=["row", "incoherent"])
def test_a_result_depends_on_its_generator_and_on_no_global_state(problem, flags, unbiased):
    W, H = problem(6, 20)
    built = build_recipe(quant="ldlq", wbits=2, unbiased=unbiased, **flags)
    before = torch.get_rng_state()
    first = quantized(W, H, built)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first.codes, quantized(W, H, built).codes)
    if flags or unbiased:
        assert not torch.equal(first.codes, quantized(W, H, built, name="v").codes)


@pytest.mark.parametrize("flags", [{}, {"groupsize": 8}, INCOHERENT], ids=str)
@pytest.mark.parametrize(
    ("quant", "unbiased"),
    [("ldlq", False), ("ldlq", True), ("ldlqRG", False), ("nearest", False)],
)
def test_company_does_not_matter(problem, quant, unbiased, flags):
    _, H = problem(6, 20)
    passes = 2 if METHODS[quant].passes else None
    built = build_recipe(quant=quant, wbits=2, npasses=passes, unbiased=unbiased, **flags)
    weights = {f"{m}": problem(m, 20, seed=m)[0].float() for m in (6, 9, 1)}
    alone = {
        name: quantize_matrix(W, H, built, rng=rng_for(3, name)) for name, W in weights.items()
    }
    for names in (list(weights), list(weights)[::-1]):
        together = quantize_matrices({k: weights[k] for k in names}, H, built, seed=3)
        met = []
        for name, q in together:
            met.append(name)
            assert torch.equal(q.codes, alone[name].codes)
            assert torch.equal(q.dequantize(), alone[name].dequantize())
            assert q.damp == alone[name].damp
        assert met == names


def test_company_shares_the_damping_that_the_first_one_needed(problem):
    W, H = problem(6, 20, dead=(3,))
    built = build_recipe(quant="ldlq", wbits=2, percdamp=0.0)
    damps = [q.damp for _, q in quantize_matrices({"a": W, "b": -W}, H, built, seed=0)]
    assert damps == [1e-3, 1e-3]


def test_one_hessian_is_factorised_once_unless_a_transform_stands_between(problem):
    W, H = problem(6, 20)
    calls: list[float] = []
    weights = {"q": W, "k": 2 * W, "v": -W}
    built = plain(feedback=failing(0, calls))
    list(quantize_matrices(weights, H, built, seed=0))
    assert len(calls) == 1
    rotated = replace(built, transforms=(transforms.KroneckerDraw(),))
    list(quantize_matrices(weights, H, rotated, seed=0))
    assert len(calls) == 1 + 3


def test_matrices_come_one_after_the_other(problem):
    W, H = problem(6, 20)
    broken = {"q": W, "k": W * float("nan")}
    results = quantize_matrices(broken, H, plain(), seed=0)
    assert next(results)[0] == "q"
    with pytest.raises(NonFinite, match="k: the weights"):
        next(results)


# By many recipes


MANY = {
    "a": {},
    "a, 3 bits": {"wbits": 3},
    "groups": {"groupsize": 8},
    "nearest": {"quant": "nearest"},
    "optq": {"quant": "gptq"},
    "greedy": {"quant": "allbal", "npasses": 2},
    "bounded": {"quant": "ldlbal_admm"},
    "more damping": {"percdamp": 0.1},
    "unbiased": {"unbiased": True},
    "rescaled": {"pre_rescale": True},
    "b": INCOHERENT,
    "b, 4 bits": {**INCOHERENT, "wbits": 4},
    "b, nearest": {**INCOHERENT, "quant": "nearest"},
    "b, unbiased": {**INCOHERENT, "unbiased": True},
    "b, unbiased, 3 bits": {**INCOHERENT, "unbiased": True, "wbits": 3},
    "b, more damping": {**INCOHERENT, "percdamp": 0.1},
    "b, auto": {**INCOHERENT, "rho": "auto"},
    "hadamard": {**INCOHERENT, "rotation": "hadamard"},
    "lattice": {"codebook": "E8P12", "wbits": None, "npasses": 0},
    "vectors": {"codebook": "vq", "vq_dim": 1, "groupsize": 32, "columns_per_group": 8},
    "vectors, kpp": {"codebook": "vq", "wbits": 1, "vq_dim": 2, "groupsize": 64, "vq_seed": "kpp"},
    "undamped": {"percdamp": 0.0},
    "undamped, 3 bits": {"percdamp": 0.0, "wbits": 3},
    "undamped, nearest": {"percdamp": 0.0, "quant": "nearest"},
    "b, undamped": {**INCOHERENT, "percdamp": 0.0},
    "b, undamped, 3 bits": {**INCOHERENT, "percdamp": 0.0, "wbits": 3},
}


@pytest.mark.parametrize("step", [1, -1])
def test_many_recipes_give_what_each_gives_alone(problem, step):
    _, H = problem(8, 16, dead=(3,))  # singular: without damping its factorisations fail at first
    labels = [*MANY][::step]
    recipes = {label: build_recipe(**{"wbits": 2, **MANY[label]}) for label in labels}
    weights = {f"{m}": problem(m, 16, seed=m)[0].float() for m in (8, 4)}
    found = {(name, k): q for name, k, q in quantize_by_many(weights, H, recipes, seed=3)}
    assert len(found) == len(weights) * len(recipes)
    for (name, label), q in found.items():
        alone = quantize_matrix(weights[name], H, recipes[label], rng=rng_for(3, name), name=name)
        assert torch.equal(q.codes, alone.codes), (name, label)
        assert torch.equal(q.dequantize(), alone.dequantize())
        assert (q.damp, q.book) == (alone.damp, alone.book)
    assert found["8", "undamped"].damp == 1e-3
    assert found["8", "undamped, nearest"].damp == 0.0


def test_a_factorisation_that_needed_more_damping_is_shared_with_its_basis(problem):
    W, H = problem(6, 20)
    least, calls = 1.05 * float(H.trace()), [0]

    def rule(H: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        if float(H.trace()) < least:
            raise NotPositiveDefinite("the smallest eigenvalue is -1.00e-09")
        return feedback.ldl(H, dim)

    rotated = {"transforms": (transforms.KroneckerDraw(),), "feedback": rule}
    recipes = {bits: plain(codebook=MinMaxGrid(bits=bits), **rotated) for bits in (2, 3)}
    recipes[4] = plain(codebook=MinMaxGrid(bits=4), **rotated | {"feedback": feedback.ldl})
    found = {bits: q for _, bits, q in quantize_by_many({"w": W}, H, recipes, seed=0)}
    assert calls == [2]
    assert {bits: q.damp for bits, q in found.items()} == {2: 0.1, 3: 0.1, 4: 0.01}
    for bits, q in found.items():
        assert torch.equal(q.dequantize(), quantized(W, H, recipes[bits]).dequantize())


class WatchedDraw:
    def __init__(self, calls: list[str]) -> None:
        self.calls, self.draw = calls, transforms.KroneckerDraw()

    def check(self, m: int, n: int) -> None:
        self.draw.check(m, n)

    def __call__(self, W: Tensor, H: Tensor, rng: torch.Generator) -> transforms.Kronecker:
        self.calls.append("draw")
        return self.draw(W, H, rng)


def watched(calls: list[str], name: str, what: Callable) -> Callable:
    def call(*given):
        calls.append(name)
        return what(*given)

    return call


def test_recipes_that_differ_in_their_codebooks_share_transforms_and_factorisations(problem):
    _, H = problem(6, 20)
    calls: list[str] = []
    draws = (WatchedDraw(calls),)
    rules = {name: watched(calls, name, getattr(feedback, name)) for name in ("ldl", "none")}
    # Drawn anew for each factorisation: what a transform leaves of H is not held.
    for chosen, expected in (((), (0, 1)), (draws, (6, 3))):
        recipes = {
            (rule, bits): plain(codebook=MinMaxGrid(bits=bits), transforms=chosen, feedback=f)
            for bits in (2, 3, 4)
            for rule, f in rules.items()
        }
        weights = {name: problem(6, 20, seed=i)[0] for i, name in enumerate("qkv")}
        calls.clear()
        met = [(name, label) for name, label, _ in quantize_by_many(weights, H, recipes, seed=0)]
        assert len(set(met)) == len(met) == 18
        assert (calls.count("draw"), calls.count("ldl")) == expected
        assert calls.count("none") == calls.count("ldl")


def test_no_more_than_one_factorisation_is_held(problem):
    W, H = problem(6, 20)
    made: list[weakref.ref] = []

    def rule(H: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        assert not any(K() is not None for K in made)
        K, h = feedback.ldl(H, dim)
        made.append(weakref.ref(K))
        return K, h

    rotated = (transforms.KroneckerDraw(),)
    recipes = {
        (order, chosen): plain(order=order, transforms=chosen, feedback=rule)
        for order in (natural, backwards)
        for chosen in ((), rotated)
    }
    found = quantize_by_many({"q": W, "k": -W}, H, recipes, seed=0)
    held = [sum(K() is not None for K in made) for _ in found]
    assert held == [1] * 7 + [0]  # at the end none is waited for
    assert len(made) == 2 + 2 * 2
