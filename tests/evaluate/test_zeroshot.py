"""Scores equal sums of log-probabilities written out; prompts as published; every refusal."""

import json
import logging
import random
import sys

import numpy as np
import pytest
import torch
import transformers as hf
import yaml

from quip.errors import QuipError, Unavailable, UsageError
from quip.evaluate import zeroshot as module
from quip.evaluate.cloze import TEXTS, cloze_items, task_config
from quip.evaluate.quiet import quiet
from quip.evaluate.zeroshot import ZeroShot, check_tasks, zeroshot
from tests.support.stories import STORY, write_stories
from tests.support.tiny import CONFIGS
from tests.support.tokenizer import save_tokenizer

pytest.importorskip("lm_eval")


def tiny_with_room(**options) -> hf.PreTrainedModel:
    """A random Llama with room for whole prompts, a token a letter."""
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 1024
    for key, value in options.items():
        setattr(config, key, value)
    model = hf.AutoModelForCausalLM.from_config(config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return tiny_with_room()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return hf.PreTrainedTokenizerFast.from_pretrained(folder)


@torch.no_grad()
def log_p(model, tokenizer, context: str, text: str) -> tuple[float, bool]:
    """sum of log p(token | all before it) over the tokens of text; is each the likeliest?"""
    start = len(tokenizer(context).input_ids)
    ids = tokenizer(context + text).input_ids
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    places = range(start, len(ids))
    total = sum(float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in places)
    return total, all(int(logits[t - 1].argmax()) == ids[t] for t in places)


def best(scores: list[float]) -> int:
    return scores.index(max(scores))


def letters(rng: random.Random, words: int) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=3)) for _ in range(words))


@pytest.fixture
def stories(tmp_path):
    rng = random.Random(0)
    rows = [
        (str(i), *(letters(rng, 3) for _ in range(4)), letters(rng, 2), letters(rng, 4), a)
        for i, a in enumerate("12212111221")
    ]
    return write_stories(tmp_path / "stories.csv", rows), rows


@pytest.mark.parametrize("batch_size", [1, 5])
def test_storycloze_scores_equal_sums_of_log_probabilities(model, tokenizer, stories, batch_size):
    path, rows = stories
    right = right_norm = 0
    for _, *sentences, first, second, answer in rows:
        endings = [first, second]
        sums = [log_p(model, tokenizer, " ".join(sentences), f" {text}")[0] for text in endings]
        right += best(sums) == int(answer) - 1
        norms = [x / len(text) for x, text in zip(sums, endings, strict=True)]
        right_norm += best(norms) == int(answer) - 1
    asked = ZeroShot(tasks=("storycloze",), storycloze_csv=path)
    found = zeroshot(model, tokenizer, asked, device="cpu", batch_size=batch_size)
    row, p = found["storycloze"], right / len(rows)
    assert 0 < p < 1
    assert row["acc"] == pytest.approx(p)
    assert row["acc_norm"] == pytest.approx(right_norm / len(rows))
    assert row["acc_stderr"] == pytest.approx((p * (1 - p) / (len(rows) - 1)) ** 0.5)
    assert row["samples"] == len(rows)
    assert row["version"] == 1.0


def test_a_limit_takes_the_first_documents_and_the_demo_cloze_is_scored_by_hand(model, tokenizer):
    right, count = 0, 9
    for item in cloze_items()[:count]:
        sums = [log_p(model, tokenizer, item["context"], f" {x}")[0] for x in item["choices"]]
        right += best(sums) == item["answer"]
    asked = ZeroShot(tasks=("quip_demo_cloze",), limit=count)
    row = zeroshot(model, tokenizer, asked, device="cpu")["quip_demo_cloze"]
    assert row["acc"] == pytest.approx(right / count)
    assert row["samples"] == count
    assert {"acc_norm", "acc_mutual_info"} <= set(row)


DOCUMENTS = [
    (
        "“he said no to bob” and ''left'' ``her``",
        '\n"he said no to bob" and "left"',
        " ``her``",
    ),
    ("  two  spaces here ", "\ntwo  spaces", " here"),
    ("a b\nc d", "\na b\nc", " d"),
]


def test_lambada_prompts_are_those_of_the_published_code():
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = task_config("lambada_quip")
    assert (config["dataset_path"], config["test_split"]) == ("EleutherAI/lambada_openai", "test")
    rows = [{"text": text} for text, _, _ in DOCUMENTS]
    task = ConfigurableTask(
        config={**config, "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}}
    )
    for row, (_, context, target) in zip(rows, DOCUMENTS, strict=True):
        assert task.fewshot_context(row, 0) == context
        assert task.construct_requests(row, context, metadata=("x", 0, 1)).args == (context, target)


def point_at(monkeypatch, path):
    """lambada_quip with its documents in a local file."""

    def local(name, **options):
        config = task_config(name, **options)
        del config["dataset_name"]
        files = {"data_files": {"test": str(path)}, "cache_dir": str(path.parent)}
        return {**config, "dataset_path": "json", "dataset_kwargs": files}

    monkeypatch.setattr(module, "task_config", local)


def test_lambada_counts_greedy_continuations_and_takes_a_perplexity(
    model, tokenizer, tmp_path, monkeypatch
):
    rng = random.Random(1)
    contexts = [letters(rng, 4) for _ in range(12)]
    texts = []
    for context in contexts:  # half of the last words are a letter that the model would choose
        scores = [log_p(model, tokenizer, f"\n{context}", f" {x}")[0] for x in "abcdefghij"]
        texts.append(f"{context} {'abcdefghij'[best(scores)]}")
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    point_at(monkeypatch, path)
    pairs = [f"\n{text}".rsplit(" ", 1) for text in texts]
    sums = [log_p(model, tokenizer, context, f" {word}") for context, word in pairs]
    mean = sum(total for total, _ in sums) / len(sums)
    row = zeroshot(model, tokenizer, ZeroShot(tasks=("lambada_quip",)), device="cpu")
    row = row["lambada_quip"]
    assert row["acc"] == pytest.approx(sum(greedy for _, greedy in sums) / len(sums))
    # The model's own float32, in batches of other shapes.
    assert row["perplexity"] == pytest.approx(float(torch.tensor(-mean).exp()), rel=1e-4)
    assert row["perplexity_stderr"] > 0


def test_a_dataset_out_of_reach_is_one_line_with_the_task_and_a_remedy(
    model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match=r"^lambada_quip: .*HF_HUB_OFFLINE=1$") as caught:
        zeroshot(model, tokenizer, ZeroShot(tasks=("lambada_quip",)), device="cpu")
    assert "\n" not in str(caught.value)


def states() -> tuple[bytes, bytes]:
    return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()


def test_nothing_of_the_caller_changes_and_nothing_is_printed(
    tokenizer, stories, capfd, caplog, monkeypatch
):
    # Its state says nothing after a whole call: the checks of types draw from it.
    monkeypatch.setattr(random, "seed", None)
    drawn = random.getstate()
    with quiet(False):
        random.random()
    assert random.getstate() == drawn
    asked = ZeroShot(tasks=("storycloze",), storycloze_csv=stories[0])
    model = tiny_with_room(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())  # untied by hand
    before, pad, level = states(), tokenizer.pad_token, logging.getLogger("lm_eval").level
    first = zeroshot(model, tokenizer, asked, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert states() == before
    assert (tokenizer.pad_token, logging.getLogger("lm_eval").level) == (pad, level)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert "tie_weights" not in vars(model)
    assert zeroshot(model, tokenizer, asked, device="cpu", progress=True) == first
    assert "loglikelihood" in capfd.readouterr().err


def test_prompts_longer_than_the_model_are_said_to_be_cut(tokenizer, stories, caplog):
    asked = ZeroShot(tasks=("storycloze",), storycloze_csv=stories[0], limit=3)
    model = tiny_with_room(max_position_embeddings=40)
    zeroshot(model, tokenizer, asked, device="cpu")
    assert "6 prompts were longer than the model" in caplog.text


LOCAL = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "text",
    "doc_to_choice": ["a", "b"],
    "doc_to_target": 0,
}


@pytest.fixture
def lm_eval_tasks(tmp_path, monkeypatch):
    """lm-eval with a few tasks of its own in place of its thousands, slow to index."""
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"ab {x}"}) + "\n" for x in "abcdef"))

    def task(name: str, splits: tuple[str, ...] = ("test",), **changes) -> dict:
        files = {"data_files": dict.fromkeys(splits, str(data)), "cache_dir": str(tmp_path)}
        return {**LOCAL, "task": name, "dataset_path": "json", "dataset_kwargs": files, **changes}

    configs = [
        task("plain"),
        task("shown", ("test", "train"), training_split="train"),
        task("fixed", ("test", "train"), training_split="train", num_fewshot=0),
        task("unsafe", unsafe_code=True),
        task("pictures", doc_to_image="text"),
        task("gone", dataset_path="nobody/nothing", dataset_kwargs={}),
        {
            "group": "both",
            "task": ["plain", "shown"],
            "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}],
        },
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, config in enumerate(configs):
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(config))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(module, "_manager", lambda defaults: manager)


@pytest.mark.usefixtures("lm_eval_tasks")
def test_a_group_gives_its_own_row_and_those_of_its_tasks(model, tokenizer):
    found = zeroshot(model, tokenizer, ZeroShot(tasks=("both", "both")), device="cpu")
    assert set(found) == {"both", "plain", "shown"}
    assert found["both"]["acc"] == pytest.approx(found["plain"]["acc"])
    assert found["plain"]["samples"] == 6


@pytest.mark.usefixtures("lm_eval_tasks")
def test_examples_are_shown_where_a_task_has_them(model, tokenizer):
    asked = ZeroShot(tasks=("shown",), num_fewshot=3)
    found = zeroshot(model, tokenizer, asked, device="cpu")
    assert found == zeroshot(model, tokenizer, asked, device="cpu")


@pytest.mark.usefixtures("lm_eval_tasks")
@pytest.mark.parametrize(
    ("task", "shots", "message"),
    [
        ("plain", 1, "plain has no examples to show"),
        ("fixed", 1, "fixed fixes num_fewshot at 0"),
        ("shown", 7, "shown has only 6 examples"),
        ("unsafe", 0, "unsafe runs code"),
        ("pictures", 0, "pictures asks about images"),
        ("both plain", 0, "plain is in both both and plain; name one"),
        ("gone", 0, "gone: its data set cannot be loaded"),
    ],
)
def test_what_a_task_cannot_do_is_refused_in_a_line(model, tokenizer, task, shots, message):
    asked = ZeroShot(tasks=tuple(task.split()), num_fewshot=shots)
    with pytest.raises(QuipError, match=message) as caught:
        zeroshot(model, tokenizer, asked, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("lm_eval_tasks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "no zero-shot task is named"),
        ({"tasks": ("plain",), "num_fewshot": -1}, "num_fewshot is -1"),
        ({"tasks": ("plain",), "limit": 0}, "limit is 0"),
        ({"tasks": ("quip_demo_cloze",), "num_fewshot": 2}, "with num_fewshot 0 only"),
        ({"tasks": ("plian",)}, "unknown zero-shot task 'plian': did you mean plain"),
        ({"tasks": ("lambada_quik",)}, "did you mean lambada_quip"),
        ({"tasks": ("zzzzzz",)}, "ours are lambada_quip, quip_demo_cloze, storycloze"),
        ({"tasks": ("plain", "storycloze")}, "licence form"),
    ],
)
def test_what_is_asked_wrongly_is_refused_at_the_door(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        check_tasks(ZeroShot(**options))
    assert "\n" not in str(caught.value)


def test_a_file_of_stories_is_checked_at_the_door(tmp_path):
    with pytest.raises(Unavailable, match="No such file"):
        check_tasks(ZeroShot(tasks=("storycloze",), storycloze_csv=tmp_path / "none.csv"))
    path = write_stories(tmp_path / "s.csv", [STORY], ("InputStoryid", *TEXTS, "Answer"))
    with pytest.raises(UsageError, match="no column AnswerRightEnding"):
        check_tasks(ZeroShot(tasks=("storycloze",), storycloze_csv=path))


def test_without_lm_eval_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"pip install -e '\.\[eval\]' \(in a checkout of quip\)"):
        check_tasks(ZeroShot(tasks=("quip_demo_cloze",)))


def test_our_own_tasks_pass_the_door_without_lm_eval_being_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # an import of it would raise
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    check_tasks(ZeroShot(tasks=("quip_demo_cloze", "lambada_quip")))


def test_a_model_in_training_mode_or_without_any_end_token_is_refused(tokenizer):
    asked = ZeroShot(tasks=("quip_demo_cloze",), limit=1)
    with pytest.raises(UsageError, match=r"eval\(\)"):
        zeroshot(tiny_with_room().train(), tokenizer, asked, device="cpu")
    with pytest.raises(UsageError, match="add bos_token"):
        zeroshot(
            tiny_with_room(bos_token_id=None, eos_token_id=None), tokenizer, asked, device="cpu"
        )
