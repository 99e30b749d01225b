"""The tasks of our own: prose of many documents, made the same way every time; stories by row."""

import os
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from quip.data.pydoc import pydoc_documents
from quip.errors import QuipError, Unavailable, UsageError
from quip.evaluate import cloze
from quip.evaluate.cloze import ANSWER, TEXTS, cloze_items, story_digest, story_rows
from tests.support.stories import STORY, write_stories


@pytest.fixture(scope="module")
def items():
    return cloze_items()


def test_items_are_the_same_for_documents_in_any_order(items):
    assert cloze_items(pydoc_documents("test")[::-1]) == items
    assert 100 <= len(items) <= cloze.ITEMS


def test_right_answers_take_turns_over_the_places(items):
    counts = Counter(item["answer"] for item in items)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == set(range(cloze.CHOICES))


def test_no_item_and_no_right_answer_comes_twice(items):
    right = [item["choices"][item["answer"]] for item in items]
    assert len(set(right)) == len(right)
    assert len({item["context"] for item in items}) == len(items)


def test_choices_are_distinct_and_equally_many_words(items):
    for item in items:
        assert len(set(item["choices"])) == cloze.CHOICES
        assert {len(choice.split()) for choice in item["choices"]} == {cloze.CONTINUATION}
        assert 30 <= len(item["context"].split()) <= 60


def test_the_right_answer_follows_its_context_and_the_others_are_from_elsewhere(items):
    texts = [" ".join(document.split()) for document in pydoc_documents("test")]
    for item in items[:40]:
        [right, *wrong] = sorted(item["choices"], key=item["choices"][item["answer"]].__ne__)
        [home] = [text for text in texts if f"{item['context']} {right}" in text]
        assert not any(choice in home for choice in wrong)


def test_no_document_gives_more_than_its_share(items):
    texts = [" ".join(document.split()) for document in pydoc_documents("test")]
    counts = [sum(item["context"] in text for item in items) for text in texts]
    assert max(counts) <= cloze.PER_DOCUMENT


def prose(topic: str) -> str:
    return " ".join(f"the {topic} of {word}" for word in "abcdefghijklmno") + "."


def test_tables_code_and_grammar_are_no_prose():
    others = [prose(topic) for topic in ("cat", "dog", "cow", "hen")]
    layouts = [
        prose("bad").replace("the bad of c", ">>> bad(c)\nthe bad of c\n>>>"),
        "\n".join(f"| the bad of {x} | in a | table |" for x in "abcdefghij"),
        prose("bad").replace(" of d", " ::= d"),
        prose("bad").replace(" of e", "     of e"),
        "+----+----+\n" + prose("bad"),
        " ".join(["bad(x=1)[0]"] * 50) + ".",
    ]
    made = cloze_items([*others, *(f">>> code\n\n{layout}" for layout in layouts)])
    assert len(made) == len(others)
    assert "bad" not in str(made)


def test_a_passage_does_not_cross_a_signature():
    half = " ".join(["word"] * 25) + "."
    documents = [f"{half}\n\ndef f(x)\n{half}", *(prose(topic) for topic in ("a", "b", "c", "d"))]
    assert "word" not in str(cloze_items(documents))


def test_too_few_documents_are_refused():
    with pytest.raises(UsageError, match="prose of at least 4 documents"):
        cloze_items([prose("cat"), prose("dog")])


def test_stories_are_read_with_a_byte_order_mark_and_commas(tmp_path):
    [row] = story_rows(write_stories(tmp_path / "s.csv", [STORY]))
    assert [row[column] for column in (*TEXTS, ANSWER)] == list(STORY[1:])


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], ("InputStoryid", *TEXTS, ANSWER), "holds no story"),
        ([STORY[:-1]], ("InputStoryid", *TEXTS), f"no column {ANSWER}; found InputStoryid, "),
        ([], (), "found none"),
        ([STORY, (*STORY[:-1], "3")], ("I", *TEXTS, ANSWER), "story 2: .* is '3', not 1 or 2"),
        ([STORY[:5]], ("I", *TEXTS, ANSWER), "is None, not 1 or 2"),
        ([(*STORY[:5], " ", *STORY[6:])], ("I", *TEXTS, ANSWER), "Quiz1 is empty"),
    ],
)
def test_a_file_that_is_no_storycloze_is_refused_in_a_line(tmp_path, rows, columns, message):
    with pytest.raises(UsageError, match=message) as caught:
        story_rows(write_stories(tmp_path / "s.csv", rows, columns))
    assert "\n" not in str(caught.value)


def test_foreign_text_in_a_message_is_bounded(tmp_path):
    wide = write_stories(tmp_path / "wide.csv", [], ("x" * 100_000,))
    long = write_stories(
        tmp_path / "long.csv", [(*STORY[:-1], "3" * 33_000)], ("I", *TEXTS, ANSWER)
    )
    for path in (wide, long):
        with pytest.raises(UsageError) as caught:
            story_rows(path)
        assert len(str(caught.value).replace(str(tmp_path), "")) < 400


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(Unavailable, match="neither a file nor a folder"):
        story_rows(tmp_path / "pipe.csv")


def test_a_file_that_cannot_be_read_is_unavailable(tmp_path):
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9")
    for name, message in (("none.csv", "No such file"), ("latin.csv", "UTF-8"), (".", "directory")):
        with pytest.raises(QuipError, match=message) as caught:
            story_rows(tmp_path / name)
        assert type(caught.value).__name__ == "Unavailable"
    with pytest.raises(UsageError, match=r"licence form at https://cs\.rochester.*storycloze_csv"):
        story_rows(None)


def test_a_file_of_stories_has_a_digest_wherever_it_is(tmp_path, monkeypatch):
    (tmp_path / "stories.csv").write_text("a,b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert story_digest(Path("~/stories.csv")) == sha256(b"a,b\n").hexdigest()
    with pytest.raises(Unavailable, match=r"missing.csv: cannot be read \(No such file"):
        story_digest(tmp_path / "missing.csv")
