"""`python -m quip.lm_eval` is lm-eval, which then reads packed checkpoints."""

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
import yaml

import quip
from quip import lm_eval as door
from tests.support.checkpoints import quantized, save

ROOT = Path(__file__).parents[1]
TASK = {
    "task": "continued",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "asked",
    "doc_to_choice": "answers",
    "doc_to_target": "right",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
ROWS = [
    {"asked": "abcd", "answers": ["efg", "hij"], "right": 0},
    {"asked": "bad", "answers": ["cab", "fgh"], "right": 1},
]


def test_lm_eval_scores_a_packed_checkpoint_as_its_logits_say(tmp_path):
    pytest.importorskip("lm_eval")
    folder = save(quantized("llama", blocks=2), tmp_path / "model")
    data, tasks = tmp_path / "test.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tasks.mkdir()
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    (tasks / "continued.yaml").write_text(yaml.safe_dump(task))
    model_args = f"pretrained={folder},dtype=float32,prefix_token_id=0"
    line = [sys.executable, "-m", "quip.lm_eval", "--model", "hf", "--model_args", model_args]
    line += ["--tasks", "continued", "--include_path", tasks, "--device", "cpu"]
    line += ["--output_path", tmp_path / "out", "--log_samples"]
    settings = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        line, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]

    model, tokenizer = quip.load(folder), quip.packed.checkpoint.read_tokenizer(str(folder))
    for row, scores in zip(ROWS, found, strict=True):
        start = len(tokenizer(row["asked"]).input_ids)
        for answer, (score, _) in zip(row["answers"], scores, strict=True):
            ids = torch.tensor([tokenizer(row["asked"] + answer).input_ids])
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            expected = sum(float(log_p[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
            assert float(score) == pytest.approx(expected, abs=1e-4)  # float32 sums, padded or not


def test_without_lm_eval_the_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(door, "find_spec", lambda name: None if name == "lm_eval" else util)
    assert door.main() == 1
    assert "needs the package lm-eval; install it with: pip install" in capsys.readouterr().err
