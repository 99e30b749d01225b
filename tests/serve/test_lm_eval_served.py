"""lm-eval asks the server, and scores what it scores of the model itself."""

import json

import pytest
import yaml

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")  # of lm-eval[api]

from tests.support.serving import KEY

CHOICES = {
    "task": "served_choices",
    "output_type": "multiple_choice",
    "doc_to_text": "asked",
    "doc_to_choice": "answers",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TEXT = {
    "task": "served_text",
    "output_type": "generate_until",
    "doc_to_text": "asked",
    "doc_to_target": "{{answers[right]}}",
    "generation_kwargs": {"until": ["\n\n", "of the"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
ROWS = [
    {"asked": "Return a list of", "answers": ["the names", "a green if"], "right": 0},
    {"asked": "The module", "answers": ["walks defines", "defines a function"], "right": 1},
    {"asked": "Raise an", "answers": ["exception", "elephant", "of of"], "right": 0},
    {"asked": "If the argument is", "answers": ["not given, the", "zebra"], "right": 1},
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder of two tasks on rows in a file."""
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for task in (CHOICES, TEXT):
        where = {"dataset_path": "json", "test_split": "test"}
        where["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | where))
    return tmp_path


def test_scores_and_texts_of_the_server_are_those_of_the_model(door, demo, tasks, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def evaluate(kind: str, **arguments: object) -> dict:
        return simple_evaluate(
            model=kind,
            model_args=arguments,
            tasks=["served_choices", "served_text"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            device="cpu",
            bootstrap_iters=0,
        )

    one = evaluate("hf", pretrained=str(demo), dtype="float32")
    other = evaluate(
        "local-completions",
        model="demo",
        base_url=f"http://127.0.0.1:{door.port}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(demo),
        max_length=512,
        num_concurrent=2,
        batch_size=2,
        add_bos_token=True,  # as hf does where the tokenizer has one
    )
    for name, scores in one["results"].items():
        found = other["results"][name]
        metrics = [key for key in scores if key.endswith(",none") and "stderr" not in key]
        assert metrics
        assert {key: found[key] for key in metrics} == {key: scores[key] for key in metrics}
    assert 0 < one["results"]["served_choices"]["acc,none"] < 1
    for name, samples in one["samples"].items():
        for mine, served in zip(samples, other["samples"][name], strict=True):
            for a, b in zip(mine["filtered_resps"], served["filtered_resps"], strict=True):
                if name == "served_text":
                    assert a == b
                else:
                    assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-4)  # float32 sums
                    assert str(a[1]) == str(b[1])
