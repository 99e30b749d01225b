import math
import weakref
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from quip import transforms
from quip.codebooks import Codebook, MinMaxGrid, RmsGrid
from quip.errors import NonFinite, NotPositiveDefinite
from quip.kernels.bits import words
from quip.matrix import feedback
from quip.matrix.build import METHODS, build_recipe
from quip.matrix.linalg import proxy_loss
from quip.matrix.order import backwards, largest_first, natural
from quip.matrix.polish import Greedy, greedy
from quip.matrix.prepare import condition
from quip.matrix.quantize import quantize_by_many, quantize_matrices, quantize_matrix
from quip.matrix.recipe import Recipe
from quip.matrix.seeds import rng_for
from quip.matrix.sweep import sweep
from quip.packed.matrix import QuantizedMatrix
from tests import reference as ref
from tests.laws import GRIDS, Points, assert_near

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


def quantized(W: Tensor, H: Tensor, built: Recipe, *, name: str = "w") -> QuantizedMatrix:
    return quantize_matrix(W, H, built, rng=rng_for(0, name), name=name)


def plain(**fields_) -> Recipe:
    return Recipe(**{"codebook": MinMaxGrid(bits=2), **fields_})


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


# Bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quant", ["nearest", "ldlq"])
def test_what_is_not_finite_is_named(problem, quant, value):
    built = build_recipe(quant=quant, wbits=2)
    W, H = problem(6, 20)
    W[2, 3] = value
    with pytest.raises(NonFinite, match=r"block\.7\.fc1: the weights hold NaN or infinity; reload"):
        quantized(W, H, built, name="block.7.fc1")
    W, H = problem(6, 20)
    H[4, 4] = value
    with pytest.raises(NonFinite, match=r"block\.7\.fc1: the inputs' second moments .*--dtype"):
        quantized(W, H, built, name="block.7.fc1")


def test_a_singular_h_is_damped_and_the_damping_recorded(problem):
    W, H = problem(6, 20, dead=(3,))
    built = build_recipe(quant="ldlq", wbits=2, percdamp=0.0)
    q = quantized(W, H, built)
    assert q.damp == 1e-3
    again = quantized(W, H, replace(built, damp=1e-3))
    assert torch.equal(q.codes, again.codes)
    assert again.damp == 1e-3


def failing(times: int, seen: list[float] | None = None):
    """LDL feedback that fails the first `times` times."""
    left = [times]

    def rule(H: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if seen is not None:
            seen.append(float(H.diagonal().mean()))
        left[0] -= 1
        if left[0] >= 0:
            raise NotPositiveDefinite("the smallest eigenvalue is -1.00e-09")
        return feedback.ldl(H, dim)

    return rule


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_damping_grows_tenfold_after_each_failure(problem, failures):
    W, H = problem(6, 20)
    seen: list[float] = []
    q = quantized(W, H, plain(feedback=failing(failures, seen)))
    assert q.damp == pytest.approx(0.01 * 10**failures)
    mean = float(H.diagonal().mean())
    assert seen == pytest.approx([mean * (1 + 0.01 * 10**k) for k in range(failures + 1)])


def test_an_escalation_redraws_the_same_rotations_for_more_damping(problem):
    W, H = problem(6, 20)
    fields_ = {"transforms": (transforms.RescaleDraw(), transforms.KroneckerDraw())}
    q = quantized(W, H, plain(feedback=failing(1), **fields_))
    direct = quantized(W, H, plain(damp=0.1, **fields_))
    assert torch.equal(q.codes, direct.codes)
    assert torch.equal(q.dequantize(), direct.dequantize())


def test_after_three_escalations_the_matrix_and_the_remedy_are_named(problem):
    W, H = problem(6, 20)
    message = (
        r"block\.7\.fc1: the smallest eigenvalue is -1\.00e-09 after damping by 10 of the mean "
        r"diagonal; add calibration tokens \(--nsamples\) or damp more \(--percdamp\)"
    )
    with pytest.raises(NotPositiveDefinite, match=message):
        quantized(W, H, plain(feedback=failing(4)), name="block.7.fc1")


def test_an_indefinite_h_is_hopeless(problem):
    W, H = problem(6, 20)
    H = H.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    H[3, 3] *= -1000
    with pytest.raises(NotPositiveDefinite, match="fc2: the smallest eigenvalue is -"):
        quantized(W, H, build_recipe(quant="gptq", wbits=2), name="fc2")


# Dead inputs


def test_weights_of_dead_inputs_become_zero_and_do_not_count(problem):
    W, H = problem(6, 20, dead=(3, 9))
    W_d, H_d = condition(W.float(), H.float())
    assert W_d.dtype == H_d.dtype == torch.float64
    assert bool((W_d[:, [3, 9]] == 0).all())
    assert torch.equal(W_d[:, 4:9], W.float().double()[:, 4:9])
    louder = W.clone()
    louder[:, [3, 9]] = 1e6
    for flags in GRIDS.values():
        built = build_recipe(quant="ldlq", wbits=2, **flags)
        assert torch.equal(
            quantized(W, H, built).dequantize(), quantized(louder, H, built).dequantize()
        )


@QUANTS
@pytest.mark.parametrize("percdamp", [0.0, 0.01])
def test_weights_of_dead_inputs_stay_small(problem, quant, percdamp):
    W, H = problem(16, 20, dead=(3, 9))
    for flags in ({}, INCOHERENT):
        built = build_recipe(quant=quant, wbits=2, percdamp=percdamp, **flags)
        W_hat = quantized(W, H, built).dequantize()
        assert float(W_hat[:, [3, 9]].abs().max()) < 5 * float(W.abs().max())
        assert flags or bool((W_hat[:, [3, 9]] == 0).all())


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
    for chosen, expected in (((), (0, 1)), (draws, (3, 3))):
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
    for _ in quantize_by_many({"q": W, "k": -W}, H, recipes, seed=0):
        assert sum(K() is not None for K in made) == 1
    assert len(made) == 2 + 2 * 2


def test_the_trial_that_was_kept_is_known(problem):
    W, H = problem(6, 20)
    trials = tuple(RmsGrid(bits=2, rhos=(rho,)) for rho in (0.1, 1.5, 9.0))
    assert quantized(W, H, plain(trials=trials)).book is trials[1]
    assert quantized(W, H, built := plain()).book is built.codebook
