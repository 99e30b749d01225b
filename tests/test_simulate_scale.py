"""scripts/simulate_scale.py on models of its kinds, narrow enough for a test."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quip.model.load import load_model

SCRIPT = Path(__file__).parent.parent / "scripts" / "simulate_scale.py"
NARROW = ("--shrink", "128", "--vocabulary", "2048")


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_a_simulation_says_what_the_run_took_and_leaves_nothing(script, tmp_path, capfd):
    line = ("--wbits", "2", "--quant", "nearest", "--nsamples", "2", "--seqlen", "16")
    script["main"](["llama-2-70b", str(tmp_path), *NARROW, *line, "--beside_memory", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert not any(tmp_path.iterdir())
    assert found["config"] == {
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
    }
    weights = 4 * 64 * 64 + 3 * 64 * 224
    assert found["block_bytes"] == pytest.approx(2 * weights, rel=0.05)
    assert found["anonymous_bytes"] > found["runtime_bytes"] / 2 > 0
    assert found["seconds_per_block"] * 80 == pytest.approx(found["extrapolated_seconds"])
    assert found["in_memory"]["equal"]
    assert found["in_memory"]["anonymous_bytes"] > found["runtime_bytes"] / 2
    words = script["words"](found)
    assert "extrapolated" in words
    assert "what it saved is equal bit for bit" in words


def test_checkpoints_differ_where_one_number_does(script, tmp_path):
    x = {"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    parts = {"one": [x], "two": [{"a": x["a"]}, {"b": x["b"]}]}
    parts["other"] = [{**x, "b": x["b"].index_fill(0, torch.tensor([1]), 2.0)}]
    for name, files in parts.items():
        (tmp_path / name).mkdir()
        for number, tensors in enumerate(files):
            save_file(tensors, tmp_path / name / f"model-{number}.safetensors")
    one, two, other = (script["digest"](tmp_path / name) for name in parts)
    assert one == two != other
    assert one["a"] == other["a"]


@pytest.mark.parametrize("name", ["llama-2-70b", "mixtral-8x7b", "llama-3b", "llama-4096"])
def test_the_files_are_those_of_such_a_model(script, name, tmp_path):
    kind, sizes = script["SIZES"][name]
    narrow = {key: max(1, sizes[key] // 128) for key in script["NARROWED"]}
    config = kind(**{**sizes, **narrow, "num_hidden_layers": 2}, vocab_size=2048)
    script["write_model"](tmp_path / "model", config)
    loaded = load_model(str(tmp_path / "model"))
    assert all(x.isfinite().all() for x in loaded.model.state_dict().values())
    assert loaded.model(input_ids=torch.arange(4)[None]).logits.isfinite().all()


def test_the_program_that_is_watched_must_succeed(script):
    with pytest.raises(RuntimeError, match="status 3"):
        script["watch"](["python3", "-c", "raise SystemExit(3)"])
