import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from quip import transforms
from quip.codebooks import MinMaxGrid, RmsGrid, candidate_rhos
from quip.errors import UsageError
from quip.matrix import feedback
from quip.matrix.build import METHODS, build_recipe
from quip.matrix.linalg import proxy_loss
from quip.matrix.order import backwards, largest_first, natural
from quip.matrix.polish import Greedy
from quip.matrix.quantize import quantize_matrix
from quip.matrix.recipe import Recipe, describe
from quip.matrix.seeds import rng_for
from tests.laws import (
    GRIDS,
    Points,
    check_blind_to_dtype,
    check_loss_falls,
    check_recipe,
    owed_bits,
)

QUANTS = pytest.mark.parametrize("quant", METHODS)
EVERY_GRID = pytest.mark.parametrize("flags", GRIDS.values(), ids=GRIDS.keys())
INCOHERENT = {"incoh_processing": True}


def build(**flags) -> Recipe:
    return build_recipe(**{"quant": "ldlq", "wbits": 2, **flags})


def quick(quant: str, flags: dict) -> dict:
    """Flags of a recipe whose greedy passes, if it has any, are few."""
    passes = 2 if METHODS[quant].passes else None
    return {"quant": quant, "wbits": 2, "npasses": passes, **flags}


# The laws, for every method, grid and width


@EVERY_GRID
@QUANTS
def test_more_bits_lose_less(problem, quant, flags):
    W, H = problem(24, 40)
    check_loss_falls(quick(quant, flags), W.float(), H)


@pytest.mark.parametrize("grid", ["row", "column"])
@pytest.mark.parametrize("quant", ["nearest", "gptq", "ldlq", "ldlbal_admm"])
def test_unbiased_rounding_obeys_the_laws(problem, quant, grid):
    W, H = problem(12, 40)
    flags = {**quick(quant, GRIDS[grid]), "unbiased": True}
    check_loss_falls(flags, W.float(), H)
    check_blind_to_dtype(flags, W, H)


@pytest.mark.parametrize(
    ("m", "n", "how"),
    [
        pytest.param(9, 44, {}, id="wide"),
        pytest.param(44, 9, {}, id="tall"),
        pytest.param(7, 13, {}, id="primes"),
        pytest.param(1, 24, {}, id="one row"),
        pytest.param(6, 1, {}, id="one column"),
        pytest.param(3, 150, {}, id="two panels"),
        pytest.param(12, 30, {"rank": 4}, id="few tokens"),
        pytest.param(12, 30, {"dead": (0, 7, 29)}, id="dead inputs"),
        pytest.param(5, 37, {"rank": 2, "dead": (36,)}, id="few tokens and a dead input"),
    ],
)
@pytest.mark.parametrize("grid", ["row, groups", "column", "columns"])
@QUANTS
def test_every_shape_of_problem_obeys_the_laws(problem, quant, grid, m, n, how):
    W, H = problem(m, n, **how)
    flags = quick(quant, GRIDS[grid])
    q = check_recipe(flags, W.float(), H)
    check_blind_to_dtype(flags, W, H)
    # What inputs of the calibration never showed must not blow up on those of tomorrow.
    assert float(q.dequantize().abs().max()) < 10 * float(W.abs().max())


@pytest.mark.parametrize("grid", ["row", "column", "faithful"])
@QUANTS
def test_weights_that_are_all_zero_stay_so(problem, quant, grid):
    W, H = problem(6, 20)
    q = check_recipe(quick(quant, GRIDS[grid]), 0 * W.float(), 1e3 * H)
    # The least step there is; grids that are symmetric about 0 do not hold it.
    assert float(q.dequantize().abs().max()) < 1e-36


@pytest.mark.parametrize("grid", ["row", "column", "faithful"])
@QUANTS
def test_a_layer_without_inputs_obeys_the_laws(problem, quant, grid):
    W, H = problem(6, 20)
    q = check_recipe(quick(quant, GRIDS[grid]), W.float(), 0 * H)
    assert float(q.dequantize().abs().max()) < 1e-36  # no input was ever there to lose


# The named rows


@pytest.mark.parametrize(
    ("quant", "order", "rule", "passes"),
    [
        ("nearest", natural, feedback.none, 0),
        ("gptq", natural, feedback.ldl, 0),
        ("ldlq", backwards, feedback.ldl, 0),
        ("ldlqRG", largest_first, feedback.ldl, 10),
        ("allbal", largest_first, feedback.coordinate, 9),  # the sweep is the first of 10
        ("ldlbal_admm", largest_first, feedback.admm, 0),
    ],
)
def test_each_method_is_a_row_of_the_table(quant, order, rule, passes):
    built = build(quant=quant)
    assert (built.order, built.feedback, built.polish) == (
        order,
        rule,
        (Greedy(passes),) if passes else (),
    )


def test_npasses_overrules_the_method():
    assert build(quant="ldlqRG", npasses=0).polish == ()
    assert build(quant="ldlq", npasses=3).polish == (Greedy(3),)
    assert build(quant="allbal", npasses=1).polish == ()
    assert build(quant="allbal", npasses=4).polish == (Greedy(3),)


def test_without_flags_a_row_has_one_asymmetric_range_and_h_is_damped():
    built = build()
    assert built.codebook == MinMaxGrid(bits=2)
    assert built.transforms == ()
    assert built.group is None
    assert built.damp == 0.01
    assert not built.clamp_target


def test_incoherence_processing_rescales_rotates_and_refits_each_column():
    built = build(**INCOHERENT)
    assert built.transforms == (transforms.RescaleDraw(), transforms.KroneckerDraw())
    assert isinstance(built.codebook, RmsGrid)
    assert built.codebook.rhos == candidate_rhos(2)
    assert built.group == 1
    assert not built.clamp_target


def test_without_feedback_the_range_is_the_papers():
    """The best range in the mean square shrinks weights, which only feedback makes up for."""
    assert build(quant="nearest", **INCOHERENT).codebook.rhos == (2.4,)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rho_auto_tries_the_default_and_fixed_ranges_about_the_gaussian_optimum(bits):
    default, auto = build(wbits=bits, **INCOHERENT), build(wbits=bits, rho="auto", **INCOHERENT)
    assert auto.trials[0] == auto.codebook == default.codebook
    fixed = [rho for book in auto.trials[1:] for rho in book.rhos]
    assert len(fixed) == len(auto.trials) - 1 == 7
    best = {2: 1.494, 3: 2.051, 4: 2.514}[bits]
    assert min(fixed) < best < 1.5 * best < max(fixed)
    assert bits == 4 or 2.4 in fixed  # the paper's
    assert {type(book) for book in auto.trials} == {RmsGrid}
    assert default.trials == ()


@pytest.mark.parametrize("range_", ["column", "16", "tensor"])
@pytest.mark.parametrize(("quant", "npasses"), [("ldlq", None), ("ldlqRG", 2), ("nearest", None)])
def test_rho_auto_keeps_the_smallest_loss_of_its_trials(problem, quant, npasses, range_):
    W, H = problem(12, 40)
    auto = build(quant=quant, npasses=npasses, range_=range_, rho="auto", **INCOHERENT)
    loss, seed = {}, partial(rng_for, 0, "w")
    for book in auto.trials:
        one = replace(auto, trials=(), codebook=book)
        q = quantize_matrix(W, H, one, rng=seed())
        damped = H + 0.01 * H.diagonal().mean() * torch.eye(40)  # what trials are judged by
        loss[book.rhos] = proxy_loss(W, q.dequantize(), damped)
    kept = quantize_matrix(W, H, auto, rng=seed())
    assert kept.book.rhos == min(loss, key=loss.get)


def test_incoherence_processing_is_short_for_its_parts():
    parts = build(pre_rescale=True, pre_proj=True, qfn="b")
    assert describe(parts) == describe(build(**INCOHERENT))
    assert describe(build(incoh_processing=True, qfn="b")) == describe(parts)


def test_parts_of_incoherence_processing_can_be_had_alone():
    assert build(pre_rescale=True).transforms == (transforms.RescaleDraw(),)
    assert build(pre_proj=True).transforms == (transforms.KroneckerDraw(),)
    assert isinstance(build(pre_rescale=True, pre_proj=True).codebook, MinMaxGrid)
    assert isinstance(build(pre_proj=True, qfn="b").codebook, RmsGrid)


@pytest.mark.parametrize(
    ("extra", "draw"),
    [
        (0, transforms.KroneckerDraw(blocked=True)),
        (1, transforms.KroneckerDraw()),
        (2, transforms.KroneckerDraw(blocked=True, permute=False)),
    ],
)
def test_pre_proj_extra_names_the_rotation(extra, draw):
    assert build(**INCOHERENT, pre_proj_extra=extra).transforms[-1] == draw


@pytest.mark.parametrize(("range_", "group"), [("tensor", None), ("column", 1), ("48", 48)])
def test_range_is_the_group_of_columns_that_share_one_scale(range_, group):
    assert build(**INCOHERENT, range_=range_).group == group


def test_the_remaining_flags_arrive():
    assert build(**INCOHERENT, rho=1.7).codebook.rhos == (1.7,)
    assert build(groupsize=128).group == 128
    assert build(percdamp=0.0).damp == 0
    assert build(unbiased=True).codebook.unbiased
    assert build(**INCOHERENT, unbiased=True).codebook.unbiased
    assert [build(wbits=b).codebook.bits for b in range(2, 9)] == list(range(2, 9))


def test_faithful_is_the_algorithm_as_printed():
    built = build(**INCOHERENT, faithful=True, wbits=3)
    assert built.codebook.rhos == (2.4,)
    assert built.group is None
    assert built.clamp_target
    baseline = build(faithful=True)
    assert baseline.clamp_target
    assert baseline.codebook == MinMaxGrid(bits=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"quant": "rtn"}, r"--quant rtn: not one of nearest, gptq, ldlq, ldlqRG, allbal, ldlbal"),
        ({"wbits": 1}, r"--wbits 1: 2 to 8 bits"),
        ({"wbits": 9}, r"--wbits 9: 2 to 8 bits"),
        ({"wbits": 16}, r"--wbits 16: .*16 evaluates only"),
        ({"percdamp": -0.1}, r"--percdamp -0\.1: damping is a finite share, 0 or more"),
        ({"percdamp": float("nan")}, r"--percdamp nan"),
        ({"percdamp": float("inf")}, r"--percdamp inf"),
        ({"pre_proj": True, "pre_proj_extra": 3}, r"--pre_proj_extra 3: not one of 0, 1, 2"),
        ({"pre_proj_extra": 0}, r"--pre_proj_extra 0 speaks of rotations: say --pre_proj"),
        ({"pre_proj": True, "qfn": "c"}, r"--qfn c: not one of a, b"),
        ({"npasses": -1}, r"--npasses -1: it cannot be negative"),
        ({"quant": "allbal", "npasses": 0}, r"--quant allbal --npasses 0 would round nothing"),
        ({"unbiased": True, "quant": "ldlqRG"}, r"--unbiased with 10 greedy passes"),
        ({"unbiased": True, "quant": "allbal"}, r"--unbiased with 10 greedy passes"),
        ({"unbiased": True, "npasses": 2}, r"--unbiased with 2 greedy passes: .*--npasses 0"),
        ({"groupsize": 0}, r"--groupsize 0: a group has at least one column"),
        ({"groupsize": 8, "faithful": True}, r"--faithful clips .*leave out --groupsize"),
        (
            {"groupsize": 8, **INCOHERENT},
            r"--groupsize 8 .*: say --no-incoh_processing",
        ),
        ({"qfn": "b"}, r"--qfn b needs --pre_proj: .*add --pre_proj"),
        ({"qfn": "b", "pre_rescale": True}, r"--qfn b needs --pre_proj"),
        ({"qfn": "a", **INCOHERENT}, r"--incoh_processing means --qfn b: leave out --qfn a"),
        ({"range_": "column"}, r"--range column speaks of grid b, .*: say --incoh_processing"),
        ({"rho": 2.0}, r"--rho 2\.0 speaks of grid b: say --incoh_processing"),
        ({"rho": 2.0, "pre_proj": True}, r"--rho 2\.0 speaks of grid b"),
        ({"rho": 0.0, **INCOHERENT}, r"--rho 0\.0: a positive number or auto"),
        ({"rho": -2.0, **INCOHERENT}, r"--rho -2\.0: a positive number or auto"),
        ({"rho": float("nan"), **INCOHERENT}, r"--rho nan: a positive number or auto"),
        ({"faithful": True, "rho": 2.0, **INCOHERENT}, r"--faithful fixes --range tensor and"),
        ({"rho": "wide", **INCOHERENT}, r"--rho wide: a positive number or auto is needed"),
        ({"rho": "auto"}, r"--rho auto speaks of grid b"),
        ({"rho": "auto", "codebook": "E8P12"}, r"--rho auto speaks of grid b: say --codebook int"),
        ({"faithful": True, "rho": "auto", **INCOHERENT}, r"--faithful fixes --range tensor and"),
        ({"faithful": True, "range_": "tensor", **INCOHERENT}, r"--faithful fixes --range tensor"),
        ({"range_": "row", **INCOHERENT}, r"--range row: say tensor, column or a number"),
        ({"range_": "0", **INCOHERENT}, r"--range 0: say tensor, column or a number"),
        ({"range_": "-4", **INCOHERENT}, r"--range -4: say tensor, column or a number"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused_with_the_reason(flags, message):
    with pytest.raises(UsageError, match=message):
        build(**flags)


# The report


@EVERY_GRID
@QUANTS
def test_a_description_is_json_and_tells_recipes_apart(quant, flags):
    described = describe(build(quant=quant, **flags))
    assert json.loads(json.dumps(described)) == described
    assert set(described) == set(Recipe.__dataclass_fields__) - {"polish"} | {"greedy_passes"}
    others = (build(quant=q, **f) for q, f in itertools.product(METHODS, GRIDS.values()))
    assert [describe(other) for other in others].count(described) == 1


def test_a_description_names_algorithms_and_their_numbers():
    rule = partial(feedback.admm, bound=0.5)
    described = describe(Recipe(codebook=RmsGrid(bits=3, rhos=(2.4,)), feedback=rule))
    assert described["feedback"] == {"name": "admm", "bound": 0.5}
    assert described["order"] == "natural"
    book = described["codebook"]
    assert book["name"] == "RmsGrid"
    assert book["bits"] == 3
    assert book["step_dtype"] == "bfloat16"
    assert not {"step", "zero", "rng"} & set(book)
    blocked = describe(build(**INCOHERENT, pre_proj_extra=2))["transforms"]
    assert blocked == [
        "Rescale.draw",
        {"name": "Kronecker.draw", "blocked": True, "permute": False},
    ]


# Orders


ORDERS = pytest.mark.parametrize(
    "order", [natural, backwards, largest_first], ids=lambda f: f.__name__
)


@ORDERS
@pytest.mark.parametrize(
    ("dim", "group"), [(1, None), (1, 1), (1, 7), (1, 100), (8, None), (8, 16)]
)
def test_orders_permute_whole_blocks_of_dim(problem, order, dim, group):
    _, H = problem(1, 40)
    p = order(H, dim, group)
    assert sorted(p.tolist()) == list(range(40))
    blocks = p.reshape(-1, dim)
    assert torch.equal(blocks - blocks[:, :1], torch.arange(dim).expand_as(blocks))
    assert bool((blocks[:, 0] % dim == 0).all())


@pytest.mark.parametrize("group", [7, 10, 16, 100])
def test_largest_first_keeps_groups_together_and_a_short_one_last(problem, group):
    _, H = problem(1, 40)
    p = largest_first(H, 1, group)
    weight, owners = H.diagonal(), (p // group).tolist()
    met = [g for g, _ in itertools.groupby(owners)]
    assert len(met) == -(-40 // group)
    if 40 % group:
        assert met[-1] == 40 // group
        met = met[:-1]
    means = [float(weight[g * group : (g + 1) * group].mean()) for g in met]
    assert means == sorted(means, reverse=True)
    for _, columns in itertools.groupby(p.tolist(), key=lambda k: k // group):
        inside = weight[list(columns)].tolist()
        assert inside == sorted(inside, reverse=True)


def test_largest_first_ranks_blocks_by_their_mean_and_keeps_equals_in_order():
    H = torch.tensor([1.0, 2, 9, 9, 3, 0, 0, 3, 5, 5]).diag()
    assert largest_first(H, 2, None).tolist() == [2, 3, 8, 9, 0, 1, 4, 5, 6, 7]
    assert largest_first(torch.eye(5), 1, None).tolist() == [0, 1, 2, 3, 4]


def test_backwards_reverses_blocks_but_not_the_columns_in_them(problem):
    H = problem(1, 6)[1]
    assert backwards(H, 1, None).tolist() == [5, 4, 3, 2, 1, 0]
    assert backwards(H, 2, None).tolist() == [4, 5, 2, 3, 0, 1]


def test_any_codebook_can_be_described():
    described = describe(Recipe(codebook=Points.random(8, 6)))
    assert "Points" in str(described["codebook"])


def test_honest_bits_are_what_the_specification_counts():
    # 2-bit codes, a 16-bit step a column, 16-bit rescaling, 64 x 64 rotations and permutations.
    rotation = 2 * (64 * 65 // 2 * 16)
    expected = 4096 * 4096 * 2 + 4096 * (16 + 16 + 3 * 12) + 2 * rotation
    assert owed_bits({"wbits": 2, **INCOHERENT}, 4096, 4096) == expected
