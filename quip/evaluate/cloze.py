"""Zero-shot tasks of our own: their configurations (tasks/*.yaml) and their documents.

`quip_demo_cloze` is made at run time from the documentation inside CPython, without a download.
One item is a passage of prose and four continuations of it, of which one is the passage's own and
three continue passages of other documents. All have the same number of words and nearly that of
letters, so that a guess by length gains little. Chance is 25 %. The texts differ between Python
versions, as pydoc's do.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from quip.data.local import listed
from quip.data.pydoc import pydoc_documents
from quip.errors import Unavailable, UsageError, one_line, shown
from quip.reading import check_regular

OWN = ("lambada_quip", "quip_demo_cloze", "storycloze")

ITEMS = 200  # at most
CHOICES = 4
CONTEXT, CONTINUATION = 30, 10  # words
NEAREST = 10  # in letters: the continuations that wrong ones are drawn from
PER_DOCUMENT = 12  # so that no module is the whole task

PROSE = 0.75  # the share of a paragraph's words that are words of English, by their spelling
WORD = re.compile(r"[(\"']?[A-Za-z][A-Za-z'-]*[)\"']?[.,;:!?)]*")
SIGNATURE = re.compile(r"(class|def) ")
# Sessions, rulers and tables, grammar rules, columns.
LAYOUT = re.compile(r"^\s*(>>>|\.\.\.|\+[-=]|\||[-=~^*]{3,})|::=|\S {3,}\S", re.MULTILINE)

TEXTS = (
    *(f"InputSentence{number}" for number in range(1, 5)),
    "RandomFifthSentenceQuiz1",
    "RandomFifthSentenceQuiz2",
)
ANSWER = "AnswerRightEnding"


def task_config(name: str, *, storycloze_csv: Path | None = None) -> dict[str, Any]:
    """The configuration of one of our own tasks, its documents included."""
    config = yaml.safe_load((files("quip.evaluate") / "tasks" / f"{name}.yaml").read_text("utf-8"))
    if name == "storycloze":
        config["custom_dataset"] = _split_of(story_rows(storycloze_csv))
    elif name == "quip_demo_cloze":
        config["custom_dataset"] = _split_of(cloze_items())
    return config


def cloze_items(documents: Iterable[str] | None = None) -> list[dict[str, str | list[str] | int]]:
    """Items {context, choices, answer}; `documents` are those of pydoc's test split if not given.

    Everything is drawn by hashes of the texts, so that the same documents in any order give the
    same items in the same order. Right answers take turns over the four places.
    """
    texts = pydoc_documents("test") if documents is None else documents
    passages = {  # continuation -> context, document; of repeated text one passage is kept
        continuation: (context, document)
        for document in sorted(set(texts))
        for context, continuation in _passages(document)
    }
    items: list[dict[str, str | list[str] | int]] = []
    for right in sorted(passages, key=_hash)[:ITEMS]:
        context, document = passages[right]
        others = [text for text, (_, source) in passages.items() if source != document]
        choices = _distractors(right, others)
        if len(choices) < CHOICES - 1:
            raise UsageError(
                f"a cloze item needs prose of at least {CHOICES} documents; give more text"
            )
        answer = len(items) % CHOICES
        choices.insert(answer, right)
        items.append({"context": context, "choices": choices, "answer": answer})
    return items


def story_digest(path: Path) -> str:
    """The SHA-256 of a StoryCloze file. Raises Unavailable where it cannot be read."""
    check_regular(path.expanduser())
    try:
        return sha256(path.expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read ({error.strerror or error})") from error


def story_rows(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a StoryCloze file, every one complete."""
    if path is None:
        raise UsageError(
            "storycloze needs its file: sign the licence form at "
            "https://cs.rochester.edu/nlp/rocstories/ and give --storycloze_csv FILE, "
            "or use the free xstorycloze_en"
        )
    check_regular(path.expanduser())
    try:
        with path.expanduser().open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise Unavailable(f"{path}: is not a CSV file in UTF-8 ({one_line(error)})") from error
    if missing := [column for column in (*TEXTS, ANSWER) if column not in columns]:
        raise UsageError(
            f"{path}: no column {missing[0]}; found {listed(columns) or 'none'}; "
            "give StoryCloze's validation or test file, with its header and its answers"
        )
    if not rows:
        raise UsageError(f"{path}: holds no story; give StoryCloze's validation or test file")
    for number, row in enumerate(rows, start=1):
        if row[ANSWER] not in ("1", "2"):
            raise UsageError(
                f"{path}: story {number}: {ANSWER} is {shown(row[ANSWER])}, not 1 or 2"
            )
        if blank := [column for column in TEXTS if not (row[column] or "").strip()]:
            raise UsageError(f"{path}: story {number}: {blank[0]} is empty; repair the file")
    return [{column: row[column] for column in (*TEXTS, ANSWER)} for row in rows]


def _distractors(right: str, others: Iterable[str]) -> list[str]:
    def drawn(other: str) -> bytes:
        return _hash(right, other)

    near = sorted(others, key=lambda other: (abs(len(other) - len(right)), drawn(other)))
    return sorted(near[:NEAREST], key=drawn)[: CHOICES - 1]


def _passages(document: str) -> list[tuple[str, str]]:
    """At most PER_DOCUMENT pairs (context, continuation), none overlapping another."""
    size = CONTEXT + CONTINUATION
    windows = [
        (" ".join(words[start : start + CONTEXT]), " ".join(words[start + CONTEXT : start + size]))
        for words in _runs(document)
        for start in range(0, len(words) - size + 1, size)
    ]
    return sorted(windows, key=lambda window: _hash(*window))[:PER_DOCUMENT]


def _runs(document: str) -> Iterator[list[str]]:
    """The words of paragraphs of prose that follow each other, within one docstring or section."""
    run: list[str] = []
    for paragraph in re.split(r"\n\s*\n", document):
        if SIGNATURE.match(paragraph):
            yield run
            run = []
            paragraph = paragraph.partition("\n")[2]
        words = paragraph.split()
        if _is_prose(paragraph, words):
            run += words
        else:
            yield run
            run = []
    yield run


def _is_prose(paragraph: str, words: list[str]) -> bool:
    if len(words) < 5 or words[-1][-1] not in ".:" or LAYOUT.search(paragraph):
        return False
    return sum(WORD.fullmatch(word) is not None for word in words) >= PROSE * len(words)


def _hash(*texts: str) -> bytes:
    return sha256("\0".join(texts).encode()).digest()


def _split_of(rows: list[dict[str, Any]]) -> Callable[..., Any]:
    def load(**_: object) -> Any:  # lm-eval passes the task's metadata
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return load
