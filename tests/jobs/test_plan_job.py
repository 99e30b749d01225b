"""A plan from a file to a checkpoint: read, run, resumed, loaded, inspected and exported."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quip.cli import main
from quip.cli.inspect import inspection_table
from quip.errors import UsageError
from quip.jobs.experiment import Experiment
from quip.jobs.inspect import inspect_checkpoint
from quip.jobs.plan import build_plan, read_plan
from quip.jobs.run import run_experiment
from quip.matrix.build import build_recipe
from quip.model import ledger_files
from quip.model.plan import Plan
from quip.packed.checkpoint import load
from tests.support.runs import save_model, write_text
from tests.support.tiny import tokens

DEFAULT = build_recipe(wbits=2, incoh_processing=True)
TEXT = """
"*.v_proj": {wbits: 4, quant: gptq}
"*.layers.3.*": {recipe: quip-3bit, percdamp: 1}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "mixed.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def asked(model, tmp_path):
    def make(**changes) -> Experiment:
        defaults = {
            "model": model,
            "dataset": write_text(tmp_path / "train.txt"),
            "recipe": build_plan({"*.v_proj": {"wbits": 4}}, default=DEFAULT),
            "nsamples": 8,
            "seqlen": 16,
            "device": "cpu",
            "out": tmp_path / "run",
        }
        return Experiment(**{**defaults, **changes})

    return make


# Reading


def test_a_file_is_patterns_and_flags_and_named_recipes(file):
    plan = build_plan(read_plan(file), default=DEFAULT)
    assert [rule.pattern for rule in plan.rules] == ["*.v_proj", "*.layers.3.*"]
    assert plan.rules[0].recipe == build_recipe(wbits=4, quant="gptq")
    assert plan.rules[1].recipe == build_recipe(wbits=3, incoh_processing=True, percdamp=1.0)
    assert plan.default is DEFAULT


def test_numbers_become_what_their_flag_takes():
    words = {"*": {"wbits": 2, "incoh_processing": True, "range": 8, "rho": 2, "percdamp": 0}}
    (rule,) = build_plan(words).rules
    same = build_recipe(wbits=2, incoh_processing=True, range_="8", rho=2.0, percdamp=0.0)
    assert rule.recipe == same


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "a mapping of patterns of matrix names to flags is needed"),
        ("- a", "a mapping of patterns of matrix names to flags is needed"),
        ("{", "cannot be read as YAML"),
        (
            '"*": {wbits: 2}\n"*": {wbits: 3}',
            r"cannot be read as YAML: the key '\*' stands there twice",
        ),
    ],
)
def test_a_file_that_is_no_plan_is_refused(file, text, reason):
    file.write_text(text)
    with pytest.raises(UsageError, match=f"--plan .*mixed.yaml: {reason}"):
        read_plan(file)
    file.unlink()
    with pytest.raises(UsageError, match=r"mixed.yaml: cannot be read"):
        read_plan(file)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({3: {"wbits": 2}}, "the plan's 3: a pattern of matrix names is needed, in quotes: "),
        ({"*": 4}, "a mapping of flags is needed, as in"),
        ({"*": {}}, "a mapping of flags is needed"),
        ({"*": {"bits": 4}}, "unknown flag 'bits'; a recipe has .*wbits"),
        ({"*": {"keep": True}}, "unknown flag 'keep'"),
        ({"*": {3: True}}, "unknown flag 3"),
        ({"*": {"wbits": "4"}}, "wbits is '4', and int or float is needed"),
        ({"*": {"wbits": True}}, "wbits is True, and int or float is needed"),
        ({"*": {"wbits": 2, "unbiased": 1}}, "unbiased is 1, and bool is needed"),
        ({"*": {"wbits": [2]}}, r"wbits is \[2\], and int or float is needed"),
        ({"*": {"wbits": 16}}, "wbits 16: a plan leaves no matrix as it is; give 2 to 8 bits"),
        ({"*": {"recipe": "quip"}}, "recipe 'quip': not one of quip-2bit"),
        ({"*": {"recipe": ["a"]}}, r"recipe \['a'\]: not one of"),
        ({"*": {"wbits": 2, "quant": "best"}}, "--quant best"),
        ({"*": {"quant": "gptq"}}, "--wbits None"),
    ],
)
def test_flags_that_mean_nothing_are_refused_with_their_pattern(words, reason):
    with pytest.raises(UsageError, match=reason):
        build_plan(words)


# Runs


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens(2), use_cache=False).logits


def test_two_recipes_from_the_command_line_to_a_dense_export(model, file, tmp_path, capsys):
    train, test = (write_text(tmp_path / f"{name}.txt") for name in ("train", "test"))
    saved = tmp_path / "saved"
    line = ["run", model, train, "--plan", str(file), "--wbits", "2", "--incoh_processing"]
    line += ["--nsamples", "8", "--seqlen", "16", "--eval_datasets", test, "--save", str(saved)]
    assert main([*line, "--out", str(tmp_path / "run")]) == 0
    assert "a plan of 2 patterns, else ldlq, 2 bits, with incoh" in capsys.readouterr().out
    report = json.loads((saved / "run.json").read_text())
    assert report["plan"]["patterns"] == ["*.v_proj", "*.layers.3.*"]
    assert report["recipe"]["codebook"]["bits"] == 2
    assert report["flags"]["plan"]["*.v_proj"] == {"wbits": 4, "quant": "gptq"}
    assert report["fingerprint"]["plan"] == report["plan"]

    found = inspect_checkpoint(saved)
    counts = [(row["codebook"]["bits"], row["quantized_matrices"]) for row in found["specs"]]
    assert sorted(counts) == [(2, 18), (3, 6), (4, 4)]
    assert found["quantized_matrices"] == 28
    bits = [row["bits_per_weight"] * row["quantized_weights"] for row in found["specs"]]
    assert sum(bits) / found["quantized_weights"] == pytest.approx(found["bits_per_weight"])
    assert found["bits_per_weight"] == pytest.approx(report["totals"]["bits_per_weight"])
    assert "grid bits=4 group=None symmetric=False" in inspection_table(found)

    card = (saved / "README.md").read_text()
    assert "the weight matrices of its blocks quantized and packed" in card
    assert "--plan plan.yaml --nsamples" in card
    assert "where plan.yaml says\n\n```yaml\n'*.v_proj':\n  wbits: 4\n" in card

    assert main(["evaluate", str(saved), "--datasets", test, "--seqlen", "16"]) == 0
    assert f"{report['perplexity'][test]:.4g}" in capsys.readouterr().out
    assert main(["export", str(saved), str(tmp_path / "dense"), "--dense"]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    packed = load(saved)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.3.mlp.up_proj"):
        W_hat = packed.get_submodule(name).dequantize()
        assert torch.equal(dense.get_submodule(name).weight, W_hat)
    # A packed layer rotates x instead of W_hat: the same product, rounded elsewhere in float32.
    torch.testing.assert_close(logits(dense.eval()), logits(packed), rtol=0, atol=1e-3)
    assert main(["export", str(saved), str(tmp_path / "sharp"), "--quip-sharp"]) == 2
    assert "its matrices are of 3 specifications" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_was_killed_is_taken_up_and_comes_out_the_same(asked, tmp_path, monkeypatch):
    whole = asked(out=tmp_path / "whole", save=tmp_path / "expected")
    expected = run_experiment(whole)
    real, kept = ledger_files.save_file, []

    def save_file(tensors, path, **options):
        kept.append(path)
        if len(kept) == 4:  # blocks and hidden states in turn
            raise KeyboardInterrupt
        real(tensors, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(ledger_files, "save_file", save_file)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(asked(save=tmp_path / "saved"))
    blocks = sorted(path.name for path in (tmp_path / "run" / "blocks").glob("block-*"))
    assert blocks
    report = run_experiment(asked(save=tmp_path / "saved", resume=True))
    assert report["fingerprint"] == expected["fingerprint"]
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("saved", "expected"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert torch.equal(logits(load(tmp_path / "saved")), logits(load(tmp_path / "expected")))


def test_a_run_of_another_plan_is_not_taken_up(asked):
    run_experiment(asked())
    others = {
        r"plan\.recipes\.\*\.v_proj\.codebook\.bits was 4, is now 3": {"*.v_proj": {"wbits": 3}},
        r"plan\.patterns was \['\*\.v_proj'\], is now \['\*\.o_proj'\]": {"*.o_proj": {"wbits": 4}},
    }
    for reason, words in others.items():
        with pytest.raises(UsageError, match=reason):
            run_experiment(asked(recipe=build_plan(words, default=DEFAULT), resume=True))
    with pytest.raises(UsageError, match=r"plan was .*, is now None"):
        run_experiment(asked(recipe=DEFAULT, resume=True))
    with pytest.raises(UsageError, match=r"recipe was .*, is now None"):
        run_experiment(asked(recipe=build_plan({"*": {"wbits": 2}}), resume=True))


def test_a_run_without_a_plan_keeps_its_fingerprint(asked):
    report = run_experiment(asked(recipe=DEFAULT))
    assert "plan" not in report
    assert [*report["fingerprint"]][:3] == ["recipe", "tuning", "seed"]
    same = run_experiment(asked(recipe=Plan.of(DEFAULT), resume=True))
    assert same["fingerprint"] == report["fingerprint"]
    assert "quantize" not in same["seconds"]


def test_a_plan_that_does_not_fit_the_model_is_refused_before_anything_is_written(asked, tmp_path):
    with pytest.raises(UsageError, match=r"'\*\.w_proj' matches no matrix"):
        run_experiment(asked(recipe=build_plan({"*.w_proj": {"wbits": 4}}, default=DEFAULT)))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_store_serves_a_plan(model, asked, tmp_path):
    train, store = write_text(tmp_path / "train.txt"), tmp_path / "store"
    line = ["hessians", model, train, "--nsamples", "8", "--seqlen", "16", "--save", str(store)]
    assert main(line) == 0
    report = run_experiment(
        asked(dataset=None, hessians=store, save=tmp_path / "saved", nsamples=128)
    )
    assert report["plan"]["patterns"] == ["*.v_proj"]
    specs = inspect_checkpoint(tmp_path / "saved")["specs"]
    assert sorted(row["quantized_matrices"] for row in specs) == [4, 24]


def test_a_plan_without_a_recipe_of_the_line_quantizes(model, tmp_path, capsys):
    path, train = tmp_path / "all.yaml", write_text(tmp_path / "train.txt")
    line = ["run", model, train, "--plan", str(path), "--nsamples", "8", "--seqlen", "16"]
    line += ["--proxy_only", "--save", str(tmp_path / "saved")]
    path.write_text('"*.mlp.*": {wbits: 4}\n"*": {wbits: 3}')
    assert main(line) == 0
    assert "a plan of 2 patterns\n" in capsys.readouterr().out
    path.write_text('"*.mlp.*": {wbits: 4}')
    assert main([*line[:-1], str(tmp_path / "other")]) == 2
    assert "no pattern of the plan matches model.layers.0.self_attn" in capsys.readouterr().err
    path.write_text('"*.mlp.*": {wbits: 9}')
    assert main(line) == 2
    assert f"quip: --plan {path}: the plan's '*.mlp.*': " in capsys.readouterr().err
