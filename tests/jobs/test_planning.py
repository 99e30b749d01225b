"""`quip plan`: within the budget by what files hold, and a file that `quip run` takes."""

import copy
import json

import pytest
import torch

from quip.cli import main
from quip.errors import UsageError
from quip.evaluate.divergence import divergence
from quip.jobs.forecast.shape import Input, empty_model, shape_of
from quip.jobs.inspect import inspect_checkpoint
from quip.jobs.plan import build_plan, read_plan
from quip.jobs.planning.choices import Choice, flags_of, groups_of
from quip.jobs.planning.fisher import expected_cost
from quip.jobs.planning.measured import swapped_gains
from quip.jobs.planning.rules import by_rules, total, uniform
from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.matrix.seeds import rng_for
from quip.model.load import load_model
from quip.packed.checkpoint import to_dense
from tests.support.processes import in_processes
from tests.support.runs import save_model, write_text
from tests.support.tiny import CONFIGS

FLAGS = {"codebook": "int", "incoh_processing": True}
WIDTHS = (2, 3, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama", positions=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("text") / "train.txt", 2000)


@pytest.fixture(scope="module")
def choices() -> list[Choice]:
    return [Choice.of(width, flags_of(FLAGS, width)) for width in WIDTHS]


def inputs(name: str = "llama") -> tuple[Input, ...]:
    return shape_of(empty_model(CONFIGS[name]())).inputs


def test_a_choice_knows_its_error_and_what_it_stores(choices):
    assert [choice.recipe for choice in choices] == [
        build_recipe(wbits=width, incoh_processing=True) for width in WIDTHS
    ]
    errors = [choice.mse for choice in choices]
    # Of Gaussian weights on the best grids of 4, 8 and 16 levels that are symmetric (Max, 1960).
    assert errors == pytest.approx([0.1188, 0.0374, 0.0115], rel=0.05)
    group, *_ = groups_of(inputs(), choices, whole_stacks=False)
    assert group.bits[1] - group.bits[0] == group.bits[2] - group.bits[1] == group.weights


def test_matrices_choose_alone_stacks_together_and_experts_of_a_block_as_one(choices):
    alone = groups_of(inputs(), choices, whole_stacks=False)
    assert [group.kind for group in alone[:7]] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    whole = groups_of(inputs(), choices, whole_stacks=True)
    assert [group.kind for group in whole[:4]] == [
        *("q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj")
    ]
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(3)]
    experts = [Input(block=0, columns=32, names=(name,), rows=(48,)) for name in names]
    (group,) = groups_of(experts, choices, whole_stacks=False)
    assert group.names == tuple(names)
    assert group.patterns == ("model.layers.0.mlp.experts.*.up_proj",)
    assert group.weights == 3 * 32 * 48


def test_a_matrix_has_only_choices_that_it_can_do():
    flags = {"codebook": "trellis", "trellis_states": 12}
    narrow, wide = (Choice.of(width, flags_of(flags, width)) for width in (1, 4))
    small = Input(block=0, columns=64, names=("model.layers.0.v_proj",), rows=(8,))
    (group,) = groups_of([small], [narrow, wide], whole_stacks=False)
    assert group.choices == (wide,)  # eight rows of one bit are no state of twelve
    with pytest.raises(UsageError, match=r"model.layers.0.v_proj: its 8 outputs"):
        groups_of([small], [narrow], whole_stacks=False)


def test_one_width_for_all_is_the_widest_within_the_budget(choices):
    groups = groups_of(inputs(), choices, whole_stacks=False)
    for index in range(3):
        exact = sum(group.bits[index] for group in groups)
        assert uniform(groups, exact) == [index] * len(groups)
        assert uniform(groups, exact - 1) == [max(0, index - 1)] * len(groups)


def test_rules_raise_k_and_v_before_the_ends_and_these_before_others(choices):
    groups = groups_of(inputs(), choices, whole_stacks=False)
    low = total(groups, [0] * len(groups))
    kv = [i for i, group in enumerate(groups) if group.kind in ("k_proj", "v_proj")]
    expected = [int(i in kv) for i in range(len(groups))]
    assert by_rules(groups, total(groups, expected)) == expected
    expected = [
        index + (group.block in (0, 3)) for group, index in zip(groups, expected, strict=True)
    ]
    assert by_rules(groups, total(groups, expected)) == expected
    for budget in range(low, total(groups, [2] * len(groups)), 10_007):
        chosen = by_rules(groups, budget)
        assert total(groups, chosen) <= budget
        left = budget - total(groups, chosen)
        assert not any(
            group.bits[i + 1] - group.bits[i] <= left
            for group, i in zip(groups, chosen, strict=True)
            if i < 2
        )


@pytest.mark.parametrize("by", ["fisher", "rules"])
def test_a_run_of_the_plan_stores_what_the_plan_says(quip, model, text, tmp_path, by):
    plan, saved = tmp_path / "plan.yaml", tmp_path / "saved"
    asked = ("--codebook", "E8P12", "--nsamples", 8, "--seqlen", 16, "--device", "cpu")
    status, out, _ = quip("plan", model, text, "--bits", 4.5, "--by", by, "--out", plan, *asked)
    assert status == 0
    said = float(out.split(f"{plan}: ")[1].split()[0])
    assert 4.4 < said <= 4.5
    assert ("expected KL" in out) == (by == "fisher")
    text_of_plan = plan.read_text()
    assert f"# quip plan {model} {text} --bits=4.5" in text_of_plan
    assert f"# {said:.4f} bits per weight" in text_of_plan
    run = ("--plan", plan, "--nsamples", 4, "--seqlen", 16, "--eval_datasets", "none")
    status, *_ = quip("run", model, text, *run, "--save", saved, "--device", "cpu")
    assert status == 0
    report = json.loads((saved / "run.json").read_text())
    assert report["totals"]["bits_per_weight"] == pytest.approx(said, abs=1e-4)
    kinds = inspect_checkpoint(saved)["specs"]
    assert 1 < len(kinds) <= 3


def test_embedding_and_head_have_a_row_of_their_own(quip, model, text, tmp_path):
    plan, saved = tmp_path / "plan.yaml", tmp_path / "saved"
    asked = ("--bits", 4, "--codebook", "int", "--by", "rules", "--head_bits", 5)
    status, out, _ = quip("plan", model, "--out", plan, *asked)
    assert status == 0
    together = float(out.split("with embedding and head ")[1].split()[0].rstrip(";"))
    assert "head_bits: 5" in plan.read_text().splitlines()
    run = ("--plan", plan, "--nsamples", 4, "--seqlen", 16, "--eval_datasets", "none")
    status, *_ = quip("run", model, text, *run, "--save", saved, "--device", "cpu")
    assert status == 0
    report = json.loads((saved / "run.json").read_text())
    assert report["tables"]["bits_per_weight_with_matrices"] == pytest.approx(together, abs=1e-3)
    assert report["flags"]["plan"]["head_bits"] == 5
    status, _, err = quip("run", model, text, *run, "--head_bits", 6)
    assert status == 2
    assert "it says head_bits 5, and the line --head_bits 6" in err[-1]
    plan.write_text('head_bits: 9\n"*": {wbits: 4}')
    status, _, err = quip("run", model, text, *run)
    assert status == 2
    assert "head_bits 9: a number of bits from 4 to 8 is needed" in err[-1]


def test_a_streamed_model_is_planned_alike(quip, model, text, tmp_path):
    asked = ("--bits", 6, "--codebook", "int", "--incoh_processing", "--nsamples", 4)
    plans = []
    for stream in ("on", "off"):
        plan = tmp_path / f"{stream}.yaml"
        line = ("plan", model, text, *asked, "--seqlen", 16, "--whole_stacks", "--out", plan)
        assert quip(*line, "--stream", stream)[0] == 0
        plans.append(plan.read_text())
    assert plans[0] == plans[1]
    recipes = build_plan(read_plan(plan)).recipes(_names())
    for block in range(4):
        names = [f"model.layers.{block}.self_attn.{x}_proj" for x in "qkv"]
        assert len({recipes[name].codebook for name in names}) == 1


def test_a_matrix_that_nothing_hears_gets_the_fewest_bits(quip, text, tmp_path):
    folder = tmp_path / "deaf"
    model = save_model(folder, "llama", positions=64, model__layers__1__mlp__down_proj__weight=0.0)
    plan = tmp_path / "plan.yaml"
    asked = ("--codebook", "int", "--incoh_processing", "--nsamples", 8, "--seqlen", 16)
    status, *_ = quip("plan", model, text, "--bits", 6, *asked, "--choices", "2,4", "--out", plan)
    assert status == 0
    recipes = build_plan(read_plan(plan)).recipes(_names())
    narrow = build_recipe(wbits=2, incoh_processing=True)
    unheard = "model.layers.1.mlp.up_proj"
    assert recipes[unheard] == narrow
    assert any(recipes[name] != narrow for name in recipes if "up_proj" in name)


@pytest.mark.parametrize("more", [{}, {"pre_rescale_out": True}, {"quant": "nearest"}])
@pytest.mark.parametrize(
    "family", [{"codebook": "E8P12"}, {"codebook": "trellis", "trellis_states": 8}]
)
def test_what_is_expected_of_a_width_is_what_rounding_costs(problem, rng, family, more):
    choice = Choice.of(2, flags_of(family | more, 2))
    W, H = problem(256, 192)
    f = torch.rand(256, generator=rng, dtype=torch.float64).pow(4) * H.trace() + 1e-3
    how = {"name": "w", "seed": 0}
    quantized = quantize_matrix(W, H, choice.recipe, rng=rng_for(0, "w"), name="w", f=f)
    E = quantized.dequantize().double() - W
    cost = 0.5 * float((f * ((E @ H) * E).sum(1)).sum() / H.trace())
    # Weights are Gaussian only about, and so are errors even over rows.
    expected = choice.mse * expected_cost(W, H, f, choice.recipe, **how)
    assert expected == pytest.approx(cost, rel=0.2)
    assert expected_cost(W, 0 * H, f, choice.recipe, **how) == 0


@pytest.fixture(scope="module")
def checkpoints(model, text, tmp_path_factory) -> dict[int, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for width in (2, 4):
        line = f"run {model} {text} --wbits {width} --nsamples 4 --seqlen 16 --eval_datasets none"
        assert main([*line.split(), "--incoh_processing", "--save", str(folder / str(width))]) == 0
    return {width: str(folder / str(width)) for width in (2, 4)}


def test_a_swap_is_a_model_with_some_matrices_of_another(model, checkpoints):
    reference, *quantized = (load_model(name).model for name in (model, *checkpoints.values()))
    narrow, wide = map(to_dense, quantized)
    before = copy.deepcopy(narrow.state_dict())
    groups = groups_of(inputs(), [Choice.of(2, flags_of(FLAGS, 2))], whole_stacks=False)
    some, ids = [groups[2], groups[6]], torch.randint(26, (3, 16), generator=rng_for(0, "ids"))
    start, gains = swapped_gains(reference, narrow, wide, some, ids, torch.device("cpu"))
    assert all(torch.equal(x, before[name]) for name, x in narrow.state_dict().items())
    assert start == pytest.approx(divergence(narrow, reference, ids, device="cpu").kl)
    for group, gain in zip(some, gains, strict=True):
        mixed = copy.deepcopy(narrow)
        (name,) = group.names
        mixed.get_submodule(name).weight = wide.get_submodule(name).weight
        kl = divergence(mixed, reference, ids, device="cpu").kl
        assert gain == pytest.approx(start - kl, rel=1e-6, abs=1e-9)


def test_a_plan_by_swaps_gains_where_swaps_do(quip, model, text, checkpoints, tmp_path):
    plan, both = tmp_path / "plan.yaml", ",".join(checkpoints.values())
    line = ("plan", model, text, "--by", "measured", "--bits", 5.5, "--out", plan)
    asked = ("--codebook", "int", "--incoh_processing", "--nsamples", 2, "--seqlen", 16)
    status, out, _ = quip(*line, *asked, "--checkpoints", both)
    assert status == 0
    assert "expected KL" in out
    recipes = build_plan(read_plan(plan)).recipes(_names())
    assert len({id(recipe) for recipe in recipes.values()}) > 1
    backwards = ",".join([*checkpoints.values()][::-1])
    for pair, reason in (
        (backwards, "name the narrow one first"),
        (f"{checkpoints[2]},{model}", "it has no quantized model.layers.0.self_attn.q_proj"),
        (checkpoints[2], "two are needed, the narrow one first"),
    ):
        status, _, err = quip(*line, *asked, "--checkpoints", pair, "--overwrite")
        assert status == 2
        assert reason in err[-1]
    status, _, err = quip(*line, *asked, "--checkpoints", both, "--choices", "2,3", "--overwrite")
    assert status == 2
    assert "has 4 bits there, and --choices are 2, 3; add it to these" in err[-1]


def _names() -> list[str]:
    return [name for one in inputs() for name in one.names]


REFUSALS = [
    ("--bits 1.2", "--bits 1.2: the narrowest of --choices stores "),
    ("--bits 9", "bits per weight and the widest "),
    ("--bits 3 --choices 2,9", "--choices 9: int has 2, 3, 4, 5, 6, 7, 8 bits; choose among"),
    ("--bits 3 --choices 2,x", "--choices: 'x' is no number of bits"),
    ("--bits 3 --wbits 3", "--wbits 3 is of one width: leave it out"),
    ("--bits 3 --by fisher", "--by fisher looks at text: give DATASET"),
    ("--bits 3 --checkpoints a,b", "--checkpoints A,B and --by measured go together"),
    ("--bits 3 --tile 256x1", "--tile 256x1 speaks of trellis: say --codebook trellis"),
    ("--bits nan", "--bits nan: at least 0 is needed"),
]


@pytest.mark.parametrize(("line", "reason"), REFUSALS)
def test_what_cannot_be_planned_is_refused(quip, model, tmp_path, line, reason):
    by = () if "--by" in line else ("--by", "rules")
    out = tmp_path / "plan.yaml"
    status, _, err = quip("plan", model, "--codebook", "int", *by, *line.split(), "--out", out)
    assert status == 2
    assert reason in err[-1]
    assert not out.exists()


def test_a_file_that_exists_is_kept_unless_it_may_be_replaced(quip, model, tmp_path):
    out = tmp_path / "plan.yaml"
    out.write_text("mine")
    line = ("plan", model, "--codebook", "int", "--by", "uniform", "--bits", 4.58, "--out", out)
    status, _, err = quip(*line)
    assert (status, out.read_text()) == (2, "mine")
    assert "it exists; name another file or add --overwrite" in err[-1]
    assert quip(*line, "--overwrite")[0] == 0
    assert read_plan(out) == {"*": {"codebook": "int", "wbits": 3}}


def test_a_quantized_model_is_refused(quip, checkpoints, tmp_path):
    line = ("plan", checkpoints[2], "--codebook", "int", "--by", "rules", "--bits", 3)
    status, _, err = quip(*line, "--out", tmp_path / "plan.yaml")
    assert status == 1
    assert "is quantized already; give the original" in err[-1]


@pytest.mark.parametrize("by", ["fisher", "measured"])
def test_processes_together_make_the_plan_of_one(model, checkpoints, tmp_path, by):
    text, windows = write_text(tmp_path / "train.txt", 10_000), 600 if by == "fisher" else 3
    line = ["plan", model, text, "--by", by, "--bits", 5.5, "--nsamples", windows, "--seqlen", 16]
    line += ["--codebook", "int", "--incoh_processing", "--device", "cpu"]  # three batches each
    if by == "measured":
        line += ["--checkpoints", ",".join(checkpoints.values())]

    def made(name: str) -> int:
        return main([str(word) for word in (*line, "--out", tmp_path / name)])

    size = 3 if by == "fisher" else 2
    assert made("alone.yaml") == 0
    assert in_processes(size, lambda: made("together.yaml")) == [0] * size
    assert (tmp_path / "together.yaml").read_bytes() == (tmp_path / "alone.yaml").read_bytes()
