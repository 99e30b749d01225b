"""quantize_matrix against the papers' algorithms, and every field of its recipe."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from quip import transforms
from quip.codebooks import Codebook, MinMaxGrid, RmsGrid
from quip.kernels.bits import words
from quip.matrix import feedback
from quip.matrix.build import METHODS, build_recipe
from quip.matrix.linalg import proxy_loss
from quip.matrix.order import backwards, largest_first, natural
from quip.matrix.polish import Greedy, greedy
from quip.matrix.recipe import Recipe
from quip.matrix.sweep import sweep
from quip.packed.matrix import QuantizedMatrix
from tests import reference as ref
from tests.laws import Points, assert_near
from tests.support.matrices import plain, quantized

QUANTS = pytest.mark.parametrize("quant", METHODS)
INCOHERENT = {"incoh_processing": True}
SINGLE = 1e-6  # dequantize returns float32


def exact(**flags) -> Recipe:
    """A recipe whose steps are not rounded and whose ADMM runs to the end, as in the oracles."""
    built = build_recipe(**{"wbits": 2, **flags})
    rule = built.feedback
    return replace(
        built,
        codebook=replace(built.codebook, step_dtype=torch.float64),
        feedback=partial(rule, tolerance=0.0) if rule is feedback.admm else rule,
    )


# Against the papers' algorithms


ORACLE_ORDER = {
    "nearest": ref.natural,
    "gptq": ref.natural,
    "ldlq": ref.backwards,
    "ldlqRG": ref.largest_first,
    "allbal": ref.largest_first,
    "ldlbal_admm": ref.largest_first,
}


def oracle_codes(quant: str, X: Tensor, H: Tensor, bits: int) -> Tensor:
    """The method on targets in code units, three greedy passes where it has any."""
    p = ORACLE_ORDER[quant](H)
    Q = partial(ref.nearest, bits=bits)
    match quant:
        case "nearest":
            return Q(X)
        case "gptq" | "ldlq":
            return ref.ldlq(X, H, Q, p)
        case "ldlqRG":
            return ref.greedy(X, ref.ldlq(X, H, Q, p), H, bits, 3, p)
        case "allbal":
            return ref.greedy(X, X, H, bits, 3, p)
        case "ldlbal_admm":
            return ref.round_bounded(X[:, p], H[p][:, p], 1.0, Q)[:, p.argsort()]
    raise AssertionError(quant)


def dense(q: QuantizedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """The drawn r, R_out and R_in of an incoherent matrix, the rotations dense."""
    rescale, kronecker = q.transform.links
    R_out, R_in = (
        R.rotate(torch.eye(n, dtype=torch.float64)).T
        for R, n in zip((kronecker.R_out, kronecker.R_in), q.codes.shape, strict=True)
    )
    return rescale.r, R_out, R_in


def processed(q: QuantizedMatrix, W: Tensor, H: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1, lines 2 to 5, with the rescaling and rotations that were drawn."""
    r, R_out, R_in = dense(q)
    return R_out @ (W * r) @ R_in.T, R_in @ (ref.damp(H, damp) / torch.outer(r, r)) @ R_in.T


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("faithful", [False, True])
@QUANTS
def test_every_method_on_the_row_grid_is_the_papers(problem, quant, faithful, bits):
    W, H = problem(9, 40)
    passes = 3 if METHODS[quant].passes else None
    q = quantized(W, H, exact(quant=quant, wbits=bits, npasses=passes, faithful=faithful))
    step, zero = (column[:, None] for column in ref.minmax_grid(W, bits))
    X = W / step + zero
    X = X.clamp(0, 2**bits - 1) if faithful else X
    codes = oracle_codes(quant, X, ref.damp(H, 0.01), bits)
    assert torch.equal(q.codes.double(), codes)
    torch.testing.assert_close(
        q.dequantize().double(), step * (codes - zero), rtol=SINGLE, atol=SINGLE
    )


@pytest.mark.parametrize("order", [ref.natural, ref.backwards])
def test_the_faithful_baseline_is_the_papers(problem, order):
    W, H = problem(9, 40)
    quant = "ldlq" if order is ref.backwards else "gptq"
    q = quantized(W, H, exact(quant=quant, faithful=True, percdamp=0.05))
    expected = ref.ldlq_baseline(W, H, 2, 0.05, order(H))
    torch.testing.assert_close(q.dequantize().double(), expected, rtol=SINGLE, atol=SINGLE)


@pytest.mark.parametrize(
    "flags",
    [{"faithful": True}, {"range_": "tensor", "rho": 1.5}],
    ids=["as printed", "clip error fed back"],
)
@pytest.mark.parametrize(("m", "n"), [(9, 40), (14, 13)])
@QUANTS
def test_every_method_on_incoherent_weights_is_algorithm_3(problem, quant, m, n, flags):
    W, H = problem(m, n)
    passes = 3 if METHODS[quant].passes else None
    q = quantized(W, H, exact(quant=quant, npasses=passes, percdamp=0.05, **INCOHERENT, **flags))
    X, G = processed(q, W, H, 0.05)
    s = flags.get("rho", 2.4) * float(X.norm()) / math.sqrt(m * n)
    targets = 3 * (X / s + 1) / 2
    targets = targets.clamp(0, 3) if "faithful" in flags else targets
    codes = oracle_codes(quant, targets, G, 2)
    assert torch.equal(q.codes.double(), codes)
    expected = ref.postprocess(s * (2 * codes / 3 - 1), *dense(q))
    assert_near(q.dequantize().double(), expected, SINGLE)


@pytest.mark.parametrize("flags", [{"groupsize": 16}, {"groupsize": 1}, {"groupsize": 48}])
@pytest.mark.parametrize("quant", ["gptq", "ldlq", "ldlqRG"])
def test_groups_of_any_order_are_refitted_on_running_weights(problem, quant, flags):
    W, H = problem(9, 100)
    built = exact(quant=quant, npasses=0, **flags)
    q = quantized(W, H, built)
    G = ref.damp(H, 0.01)
    p = built.order(G, 1, built.group)
    expected = ref.optq(W[:, p], G[p][:, p], lambda X: ref.minmax_rounding(X, 2), group=built.group)
    assert q.decoder.step.shape[1] == -(-100 // built.group)
    assert_near(q.dequantize().double(), expected[:, p.argsort()], SINGLE)


@pytest.mark.parametrize("range_", ["column", "16", "48"])
@pytest.mark.parametrize("quant", ["gptq", "ldlq", "ldlqRG"])
def test_the_incoherent_range_is_refitted_on_running_weights(problem, quant, range_):
    W, H = problem(9, 100)
    built = exact(quant=quant, npasses=0, range_=range_, rho=1.8, percdamp=0.05, **INCOHERENT)
    q = quantized(W, H, built)
    X, G = processed(q, W, H, 0.05)
    p = built.order(G, 1, built.group)
    X_hat = ref.optq(X[:, p], G[p][:, p], lambda Y: ref.rms_rounding(Y, 2, 1.8), group=built.group)
    expected = ref.postprocess(X_hat[:, p.argsort()], *dense(q))
    assert_near(q.dequantize().double(), expected, SINGLE)


def test_each_method_of_the_paper_loses_less_than_the_one_it_improves(problem):
    W, H = problem(24, 64)
    loss = {}
    for quant in METHODS:
        W_hat = quantized(W, H, build_recipe(quant=quant, wbits=2, **INCOHERENT)).dequantize()
        loss[quant] = proxy_loss(W, W_hat, H)
    assert loss["ldlqRG"] < loss["ldlq"] < loss["nearest"]
    assert loss["gptq"] < loss["nearest"]
    assert loss["allbal"] < loss["nearest"]
    assert loss["ldlbal_admm"] < loss["nearest"]


def test_incoherence_processing_saves_weights_with_outliers(problem):
    W, H = problem(32, 64)
    W[torch.arange(32), torch.arange(32)] *= 30
    losses = [
        proxy_loss(W, quantized(W, H, build_recipe(quant="ldlq", wbits=2, **f)).dequantize(), H)
        for f in ({}, INCOHERENT)
    ]
    assert losses[1] < losses[0] / 2


# Vector codebooks, orders and the way back


def fitted(built: Recipe, W: Tensor, h: Tensor) -> Codebook:
    return built.codebook if built.group else built.codebook.fit(W, h)


@pytest.mark.parametrize("order", [natural, backwards, largest_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("group", [None, 8, 24, 32])
@pytest.mark.parametrize("passes", [0, 2])
def test_codes_are_kept_in_natural_order_whatever_the_order_of_rounding(
    problem, order, group, passes
):
    W, H = problem(9, 72)
    built = plain(codebook=Points.random(8, 6), order=order, group=group, polish=(Greedy(passes),))
    q = quantized(W, H, built)
    assert q.codes.shape == (9, 9)
    W_hat = q.dequantize().double()
    p = order(ref.damp(H, 0.01), 8, group)
    starts = p[::8].tolist()
    K, h = built.feedback(ref.damp(H, 0.01)[p][:, p], 8)
    codes, books = sweep(W[:, p], K, h, fitted(built, W[:, p], h), group=group)
    if passes:
        H_p = ref.damp(H, 0.01)[p][:, p]
        codes = greedy(W[:, p], H_p, codes, books, group=group, passes=passes)
    for position, lo in enumerate(starts):
        book = books[position * 8 // group if group else 0]
        assert torch.equal(q.codes[:, lo // 8], codes[:, position])
        assert_near(W_hat[:, lo : lo + 8], book.decode(codes[:, position]), SINGLE)
    assert round(q.bits_per_weight * 9 * 72) == 9 * words(9, 6) * 32 + len(books) * 32
    assert proxy_loss(W, W_hat, H) < 1


def test_a_quantized_matrix_is_frozen_and_decodes_to_single_precision(problem):
    q = quantized(*problem(6, 20), build_recipe(quant="ldlq", wbits=2, **INCOHERENT))
    assert q.dequantize().dtype == torch.float32
    with pytest.raises(FrozenInstanceError):
        q.damp = 0.0


def test_double_weights_are_rounded_in_double_precision(problem):
    W, H = problem(6, 20)
    seen: list[torch.dtype] = []

    class Watched(MinMaxGrid):
        def round(self, x: Tensor, h: Tensor) -> Tensor:
            seen.append(x.dtype)
            return super().round(x, h)

    for given in (W, W.float(), W.bfloat16()):
        quantized(given, H, plain(codebook=Watched(bits=2)))
    assert seen == [torch.float64] * 20 + [torch.float32] * 40


# Every field of a recipe


CHANGES: dict[str, Callable[[Recipe], Recipe]] = {
    "codebook": lambda r: replace(r, codebook=RmsGrid(bits=2, rhos=(2.4,))),
    "transforms": lambda r: replace(r, transforms=(transforms.RescaleDraw(),)),
    "order": lambda r: replace(r, order=backwards),
    "feedback": lambda r: replace(r, feedback=feedback.none),
    "group": lambda r: replace(r, group=8),
    "damp": lambda r: replace(r, damp=1.0),
    "polish": lambda r: replace(r, polish=(Greedy(1),)),
    "clamp_target": lambda r: replace(r, clamp_target=True),
    "trials": lambda r: replace(r, trials=(MinMaxGrid(bits=2), RmsGrid(bits=2, rhos=(2.2,)))),
}
OF_MODELS = {"stack"}  # what several matrices do together


@pytest.mark.parametrize("field", sorted({f.name for f in fields(Recipe)} - OF_MODELS))
def test_every_field_of_a_recipe_changes_the_result(problem, field):
    W, H = problem(9, 40)
    built = plain(codebook=RmsGrid(bits=2, rhos=(1.5,)))
    ours = quantized(W, H, built).dequantize()
    assert torch.equal(ours, quantized(W, H, replace(built)).dequantize())
    assert not torch.equal(ours, quantized(W, H, CHANGES[field](built)).dequantize())


def test_the_trial_that_was_kept_is_known(problem):
    W, H = problem(6, 20)
    trials = tuple(RmsGrid(bits=2, rhos=(rho,)) for rho in (0.1, 1.5, 9.0))
    assert quantized(W, H, plain(trials=trials)).book is trials[1]
    assert quantized(W, H, built := plain()).book is built.codebook
