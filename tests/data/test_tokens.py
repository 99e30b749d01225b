"""The data sets against the published sampling, written a second time below; no network."""

import hashlib
import json
import logging
import os
import random
import struct
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quip.data import DATASETS, TokenSet, calibration_tokens, evaluation_tokens, tokens
from quip.data import pydoc as pydoc_source
from quip.data.local import local_part
from quip.data.pydoc import pydoc_documents
from quip.errors import Unavailable, UsageError
from quip.reading import VALUES

SEQLEN = 16


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, `</s>` in front, as OPT's tokenizer does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"</s>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="</s>", model_max_length=SEQLEN)


def sentences(count: int, seed: int) -> list[str]:
    """Documents of very different lengths, some empty, as in WikiText-2."""
    rng = random.Random(seed)
    return [
        "".join(rng.choices("abc dé\n", k=rng.choice([0, 3, 15, 16, 40]))) for _ in range(count)
    ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A hub of synthetic documents; gives them by split and keeps the calls made to it."""
    held = {split: sentences(1200, i) for i, split in enumerate(["train", "validation", "test"])}
    calls = []

    def load_dataset(**call):
        calls.append(call)
        column = "sentence" if "ptb" in str(call) else "text"
        return datasets.Dataset.from_dict({column: held[call["split"]]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return {"calls": calls} | held


# The published rule, from its description: Python's global random, one or two draws a sample.


def published_window(ids: list[int]) -> list[int]:
    start = random.randint(0, len(ids) - SEQLEN - 1)
    return ids[start : start + SEQLEN]


def published_from_text(text, tokenizer, nsamples, seed):
    random.seed(seed)
    ids = tokenizer(text).input_ids
    return torch.tensor([published_window(ids) for _ in range(nsamples)])


def published_from_documents(documents, tokenizer, nsamples, seed):
    random.seed(seed)
    rows = []
    while len(rows) < nsamples:
        ids = tokenizer(documents[random.randint(0, len(documents) - 1)]).input_ids
        if len(ids) > SEQLEN:
            rows.append(published_window(ids))
    return torch.tensor(rows)


def published_evaluation(text, tokenizer):
    ids = tokenizer(text).input_ids
    return torch.tensor([ids[i * SEQLEN : (i + 1) * SEQLEN] for i in range(len(ids) // SEQLEN)])


@pytest.mark.parametrize(
    ("name", "join"), [("wikitext2", "\n\n"), ("ptb", "\n\n"), ("ptb-new", " ")]
)
@pytest.mark.parametrize("seed", [0, 7])
def test_calibration_on_a_joined_text_is_the_published_one(hub, tokenizer, name, join, seed):
    ours = calibration_tokens(name, tokenizer, nsamples=9, seqlen=SEQLEN, seed=seed)
    published = published_from_text(join.join(hub["train"]), tokenizer, 9, seed)
    assert torch.equal(ours.ids, published)
    assert (ours.dataset, ours.split, ours.join, ours.seqlen) == (name, "train", join, SEQLEN)


@pytest.mark.parametrize("name", ["c4", "c4-new"])
def test_calibration_on_c4_is_the_published_one(hub, tokenizer, name):
    ours = calibration_tokens(name, tokenizer, nsamples=30, seqlen=SEQLEN, seed=3)
    assert torch.equal(ours.ids, published_from_documents(hub["train"], tokenizer, 30, 3))
    assert (ours.split, ours.join) == ("train", None)


@pytest.mark.parametrize(
    ("name", "split", "join"),
    [("wikitext2", "test", "\n\n"), ("ptb", "validation", "\n\n"), ("ptb-new", "test", " ")],
)
def test_evaluation_on_a_joined_text_is_the_published_one(hub, tokenizer, name, split, join):
    ours = evaluation_tokens(name, tokenizer, seqlen=SEQLEN)
    assert torch.equal(ours.ids, published_evaluation(join.join(hub[split]), tokenizer))
    assert (ours.split, ours.join) == (split, join)


def test_evaluation_on_c4_draws_256_windows_from_seed_0(hub, tokenizer):
    ours = evaluation_tokens("c4", tokenizer, seqlen=SEQLEN)
    assert torch.equal(ours.ids, published_from_documents(hub["validation"], tokenizer, 256, 0))


def test_evaluation_on_c4_new_cuts_1100_joined_documents_to_256_windows(hub, tokenizer):
    ours = evaluation_tokens("c4-new", tokenizer, seqlen=SEQLEN)
    text = " ".join(hub["validation"][:1100])
    assert torch.equal(ours.ids, published_evaluation(text, tokenizer)[:256])
    assert len(ours.ids) == 256


@pytest.mark.parametrize("name", ["wikitext2", "c4", "c4-new"])
def test_fewer_evaluation_windows_are_the_first_ones(hub, tokenizer, name):
    whole = evaluation_tokens(name, tokenizer, seqlen=SEQLEN)
    some = evaluation_tokens(name, tokenizer, seqlen=SEQLEN, nsamples=5)
    assert torch.equal(some.ids, whole.ids[:5])


def test_a_sample_does_not_depend_on_the_global_random_stream(hub, tokenizer):
    samples = []
    for state in (1, 2):
        random.seed(state)
        samples.append(calibration_tokens("c4", tokenizer, nsamples=2, seqlen=SEQLEN, seed=0).ids)
    assert torch.equal(*samples)


def test_the_hub_is_asked_for_the_present_homes(hub, tokenizer):
    for name in ("wikitext2", "ptb", "c4"):
        calibration_tokens(name, tokenizer, nsamples=1, seqlen=SEQLEN, seed=0)
    wikitext, ptb, c4 = hub["calls"]
    assert (wikitext["path"], wikitext["name"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert ptb["path"] == "ptb-text-only/ptb_text_only"
    assert ptb["revision"] == "refs/convert/parquet"
    assert c4["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}


def test_ptb_falls_back_to_the_parquet_file_itself(tokenizer, monkeypatch):
    def load_dataset(path, **call):
        if path != "parquet":
            raise RuntimeError("Dataset scripts are no longer supported")
        assert "refs%2Fconvert%2Fparquet/penn_treebank/test/" in call["data_files"]["test"]
        return datasets.Dataset.from_dict({"sentence": sentences(20, 0)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(evaluation_tokens("ptb-new", tokenizer, seqlen=SEQLEN).ids) > 1


def test_an_unreachable_hub_is_one_line_with_reason_and_remedy(tokenizer, monkeypatch):
    def load_dataset(**call):
        raise ConnectionError("no route to host\nand forty more lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(Unavailable) as caught:
        calibration_tokens("c4", tokenizer, nsamples=1, seqlen=SEQLEN, seed=0)
    line = str(caught.value)
    assert "\n" not in line
    for part in ("c4", "allenai/c4", "ConnectionError: no route to host", ".jsonl", "pydoc"):
        assert part in line


def test_a_missing_datasets_package_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Unavailable, match=r"wikitext2: .*datasets"):
        evaluation_tokens("wikitext2", tokenizer, seqlen=SEQLEN)


def test_an_unknown_name_lists_the_known_ones(tokenizer):
    with pytest.raises(UsageError, match=r"'wikitext3'.*no.*of this name") as caught:
        evaluation_tokens("wikitext3", tokenizer, seqlen=SEQLEN)
    assert all(name in str(caught.value) for name in DATASETS)


@pytest.mark.parametrize("sizes", [{"nsamples": 0, "seqlen": 4}, {"nsamples": 1, "seqlen": 0}])
def test_sizes_below_one_are_refused(tokenizer, sizes):
    with pytest.raises(UsageError, match="is 0; it must be at least 1"):
        calibration_tokens("pydoc", tokenizer, seed=0, **sizes)


def test_text_of_exactly_one_window_is_evaluated_but_too_short_to_calibrate(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("x" * (SEQLEN - 1))  # and </s>
    assert evaluation_tokens(str(path), tokenizer, seqlen=SEQLEN).ids.shape == (1, SEQLEN)
    with pytest.raises(UsageError, match=r"short.txt: 16 tokens.*need at least 17; lower --seqlen"):
        calibration_tokens(str(path), tokenizer, nsamples=1, seqlen=SEQLEN, seed=0)
    with pytest.raises(UsageError, match=r"16 tokens are less than one window of 17"):
        evaluation_tokens(str(path), tokenizer, seqlen=SEQLEN + 1)


def test_a_search_for_a_long_document_ends(hub, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "DRAWS", 50)
    with pytest.raises(UsageError, match=r"c4: none of 50 documents drawn .* 81 tokens"):
        calibration_tokens("c4", tokenizer, nsamples=1, seqlen=81, seed=0)  # at most 40 letters


def test_fewer_tokens_than_asked_for_are_refused_with_the_number_that_fits(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("x" * 40)  # and </s>
    assert calibration_tokens(str(path), tokenizer, nsamples=2, seqlen=SEQLEN, seed=0).ids.numel()
    line = r"text.txt: 41 tokens, but 3 windows of 16 ask for 48; lower --nsamples to 2 or less"
    with pytest.raises(UsageError, match=line):
        calibration_tokens(str(path), tokenizer, nsamples=3, seqlen=SEQLEN, seed=0)


def test_the_tokenizer_does_not_complain_about_long_texts(tokenizer, caplog):
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    tokenizer.deprecation_warnings.clear()  # the complaint is made once
    try:
        tokens.encode(tokenizer, "x" * 1000)
        assert not caplog.records
        tokenizer("x" * 1000)
        assert "longer than the specified maximum" in caplog.text  # the complaint exists
    finally:
        library.removeHandler(caplog.handler)


# Local files


def write(folder: Path, suffix: str, documents: list[str]) -> Path:
    path = folder / f"documents.{suffix}"
    records = [{"id": i, "text": text} for i, text in enumerate(documents)]
    if suffix == "txt":
        path.write_bytes("\n\n".join(documents).encode())
    elif suffix == "json":
        path.write_text(json.dumps(records, indent=1))
    elif suffix == "jsonl":
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "parquet"])
def test_every_local_format_gives_the_same_tokens(tokenizer, tmp_path, suffix):
    documents = ["first\r\ndocument", "", "sécond\u2028one", "x" * 50]
    path = write(tmp_path, suffix, documents)
    ours = evaluation_tokens(str(path), tokenizer, seqlen=SEQLEN)
    assert torch.equal(ours.ids, published_evaluation("\n\n".join(documents), tokenizer))
    assert (ours.dataset, ours.split, ours.join) == (str(path), "whole", "\n\n")
    drawn = calibration_tokens(str(path), tokenizer, nsamples=4, seqlen=SEQLEN, seed=5)
    published = published_from_text("\n\n".join(documents), tokenizer, 4, 5)
    assert torch.equal(drawn.ids, published)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_data_may_hold_more_values_than_words_may(tmp_path, suffix):
    text = "," * (VALUES + 1)
    (tmp_path / f"data{suffix}").write_text(json.dumps({"text": text}) + "\n" + '{"text": "b"}')
    assert local_part(tmp_path / f"data{suffix}", "train").load("whole") == [text, "b"]


def test_one_record_is_a_json_file_too(tokenizer, tmp_path):
    path = write(tmp_path, "jsonl", ["x" * 40])
    assert len(evaluation_tokens(str(path), tokenizer, seqlen=SEQLEN).ids) == 2


def test_a_folder_is_its_files_in_the_order_of_their_names(tokenizer, tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "of two"}')
    (tmp_path / "readme.md").write_text("not read")
    ours = evaluation_tokens(str(tmp_path), tokenizer, seqlen=4)
    text = "first\n\nof two\n\nsecond"
    assert ours.ids.flatten().tolist() == tokenizer(text).input_ids[: ours.ids.numel()]
    assert ours.split == "whole"


def test_a_folder_of_named_splits_keeps_them_apart(tokenizer, tmp_path):
    for split in ("train-0", "train-1", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(split * 10)
    calibration = calibration_tokens(str(tmp_path), tokenizer, nsamples=1, seqlen=140, seed=0)
    evaluation = evaluation_tokens(str(tmp_path), tokenizer, seqlen=41)
    text = "train-0" * 10 + "\n\n" + "train-1" * 10
    assert tokenizer.decode(calibration.ids[0], skip_special_tokens=True) in text
    assert tokenizer.decode(evaluation.ids[0]) == "</s>" + "test" * 10
    assert (calibration.split, evaluation.split) == ("train", "test")


def test_a_folder_without_the_split_asked_for_is_refused(tokenizer, tmp_path):
    (tmp_path / "test.txt").write_text("x" * 100)
    with pytest.raises(UsageError, match=r"no file train\* among test.txt"):
        calibration_tokens(str(tmp_path), tokenizer, nsamples=1, seqlen=4, seed=0)


@pytest.mark.parametrize(
    ("file", "content", "error", "line"),
    [
        ("a.csv", b"text\nx", UsageError, r"a.csv: not a file that can be read; use .txt, .json"),
        ("a.txt", b"ab\xffcd", Unavailable, r"a.txt: byte 2 is not UTF-8"),
        ("a.json", b'[{"body": "x", "id": 1}]', UsageError, r"no column `text`.*: body, id"),
        ("a.json", b"[1, 2]", UsageError, r"no column `text`; found columns: none"),
        ("a.jsonl", b'{"text": null}', UsageError, r"text is None in a record"),
        ("a.json", b'[{"text": "a\\ud800b"}]', Unavailable, r"a.json: .*ud800.* no valid Unicode"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\udfff"}', Unavailable, r"line 2 .*valid Unicode"),
        ("a.txt", b"ab\xed\xa0\x80cd", Unavailable, r"a.txt: byte 2 is not UTF-8"),
        ("a.json", b"[" * 200_000, Unavailable, r"a.json: .*deep"),
        ("a.jsonl", b'{"text": "x", "text": "y"}', Unavailable, r"'text' stands there twice"),
        ("a.json", b'{"%s": 1}' % (b"x" * 3_000_000), UsageError, r"found columns: x+ and more"),
        ("a.jsonl", b'{"text": [%s 1]}' % (b"1," * 33_000), UsageError, r"text is \[1, 1.*\.\.\."),
        ("a.jsonl", b'{"text": "x"}\n{"text"', Unavailable, r"a.jsonl: line 2 is not JSON"),
        ("a.parquet", b"PAR0", Unavailable, r"a.parquet: cannot be read as parquet"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tokenizer, tmp_path, file, content, error, line):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(error, match=line) as caught:
        evaluation_tokens(str(tmp_path / file), tokenizer, seqlen=4)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 350


def test_a_parquet_file_whose_text_is_not_utf_8_is_refused(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    raw = pyarrow.array([b"ab\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": raw}), path)
    with pytest.raises(Unavailable, match=r"a.parquet: cannot be read as parquet \(.*utf-8"):
        evaluation_tokens(str(path), tokenizer, seqlen=4)


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl"])
def test_a_mark_of_the_encoding_is_no_text(tokenizer, tmp_path, suffix):
    documents = ["first \ufeffdocument", "x" * 50]
    path = write(tmp_path, suffix, documents)
    expected = evaluation_tokens(str(path), tokenizer, seqlen=SEQLEN).ids
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert torch.equal(evaluation_tokens(str(path), tokenizer, seqlen=SEQLEN).ids, expected)


def test_numbers_that_are_none_are_no_obstacle_beside_a_text(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some text", "score": NaN}')
    assert len(evaluation_tokens(str(path), tokenizer, seqlen=4).ids) == 2


def test_a_pipe_is_not_waited_for(tokenizer, tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for name in (tmp_path / "a.txt", tmp_path):  # by its name, and as a file of a folder
        with pytest.raises(Unavailable, match=r"a.txt: neither a file nor a folder; copy"):
            evaluation_tokens(str(name), tokenizer, seqlen=4)


@pytest.mark.parametrize("name", ["x" * 300, "y" * 33_000, "loop/a.txt", "a\0b"])
def test_names_that_lead_nowhere_are_refused_in_a_line(tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(
        UsageError, match=r"unknown data set .*there is none of this name"
    ) as caught:
        evaluation_tokens(name, tokenizer, seqlen=4)
    assert len(str(caught.value)) < 500


def test_a_parquet_file_without_text_lists_its_columns(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x"], "label": [1]}), path)
    with pytest.raises(UsageError, match="no column `text`; found columns: body, label"):
        evaluation_tokens(str(path), tokenizer, seqlen=4)


def test_an_empty_folder_is_refused(tokenizer, tmp_path):
    with pytest.raises(UsageError, match=r"holds no .txt, .json, .jsonl, .parquet file"):
        evaluation_tokens(str(tmp_path), tokenizer, seqlen=4)


# The documentation inside Python


def test_pydoc_splits_are_disjoint_and_about_one_tenth_is_test():
    train, test = pydoc_documents("train"), pydoc_documents("test")
    assert not set(train) & set(test)
    assert 0.04 < sum(map(len, test)) / sum(map(len, train + test)) < 0.2


def test_pydoc_topics_do_not_repeat_each_other():
    topics = [d for name, d in pydoc_source._documents().items() if name.startswith("topic ")]
    bodies = [topic.split("\n", 3)[-1] for topic in topics]
    assert all(body not in t for i, body in enumerate(bodies) for t in topics[i + 1 :])
    assert len(topics) > 40


def test_pydoc_is_read_the_same_way_twice():
    again = pydoc_source._documents.__wrapped__()  # past the cache
    assert list(again.items()) == list(pydoc_source._documents().items())


def test_pydoc_holds_signatures_with_their_docstrings():
    text = "\n\n".join(pydoc_documents("train") + pydoc_documents("test"))
    assert "class JSONDecoder(object)\nSimple JSON <https://json.org> decoder" in text
    assert 'The "assert" statement' in text


def test_pydoc_is_sampled_like_wikitext2(tokenizer):
    ours = calibration_tokens("pydoc", tokenizer, nsamples=3, seqlen=SEQLEN, seed=1)
    text = "\n\n".join(pydoc_documents("train"))
    assert torch.equal(ours.ids, published_from_text(text, tokenizer, 3, 1))
    assert evaluation_tokens("pydoc", tokenizer, seqlen=SEQLEN, nsamples=2).split == "test"


def test_a_stripped_python_is_named(monkeypatch):
    monkeypatch.setattr(pydoc_source, "_modules", dict)
    with pytest.raises(Unavailable, match=r"pydoc: this Python .* without .*source files"):
        pydoc_source._documents.__wrapped__()
    monkeypatch.setattr(pydoc_source, "_topics", dict)
    with pytest.raises(Unavailable, match=r"without pydoc_data.topics; .*local text file"):
        pydoc_source._documents.__wrapped__()


# The stamp


def test_the_hash_is_that_of_the_little_endian_ids():
    ids = torch.tensor([[1, 2, 3], [4, 5, 50271]])
    stamp = TokenSet(ids, "pydoc", "test", "\n\n").sha256
    assert stamp == hashlib.sha256(struct.pack("<6q", 1, 2, 3, 4, 5, 50271)).hexdigest()
    assert stamp == TokenSet(ids.clone(), "c4", "train", None).sha256
    assert stamp != TokenSet(ids.flip(0), "pydoc", "test", "\n\n").sha256


def test_windows_of_gemma_begin_with_bos_and_those_of_others_do_not(tokenizer, tmp_path):
    class GemmaTokenizerFast(type(tokenizer)):
        pass

    path = tmp_path / "text.txt"
    path.write_text("ab " * 400)
    gemma = GemmaTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="a")
    for draw, how in ((calibration_tokens, {"nsamples": 2, "seed": 0}), (evaluation_tokens, {})):
        plain, ours = (draw(str(path), one, seqlen=SEQLEN, **how) for one in (tokenizer, gemma))
        assert (ours.ids[:, 0] == gemma.bos_token_id).all()
        assert torch.equal(ours.ids[:, 1:], plain.ids[:, 1:])
    unnamed = GemmaTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert torch.equal(evaluation_tokens(str(path), unnamed, seqlen=SEQLEN).ids, plain.ids)
