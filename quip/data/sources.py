"""What every named data set is made of: where it lives, which splits, what joins its documents."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quip.data.pydoc import pydoc_documents
from quip.data.reach import reach_hub
from quip.errors import Unavailable, one_line


@dataclass(frozen=True)
class Part:
    """One use of a data set, with the protocol that published numbers follow."""

    load: Callable[[str], Sequence[str]]  # split -> documents
    split: str
    join: str | None  # between documents; None: windows are drawn from single documents
    documents: int | None = None  # only the first so many
    windows: int = sys.maxsize  # at most so many


@dataclass(frozen=True)
class Source:
    calibration: Part
    evaluation: Part


def _wikitext2(split: str) -> Sequence[str]:
    return _download(
        "wikitext2",
        "text",
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": split},
    )


def _ptb(split: str) -> Sequence[str]:
    # Two ways to the same files: the hub's conversion of a data set once defined by a script.
    home = "ptb-text-only/ptb_text_only"
    file = f"hf://datasets/{home}@refs%2Fconvert%2Fparquet/penn_treebank/{split}/0000.parquet"
    return _download(
        "ptb",
        "sentence",
        {"path": home, "revision": "refs/convert/parquet", "split": split},
        {"path": "parquet", "data_files": {split: file}, "split": split},
    )


def _c4(split: str) -> Sequence[str]:
    shards = {"train": "00000-of-01024", "validation": "00000-of-00008"}
    file = f"en/c4-{split}.{shards[split]}.json.gz"
    return _download(
        "c4",
        "text",
        {
            "path": "allenai/c4",
            "data_files": {split: file},
            "split": split,
            # The recorded sizes are those of all shards, not of this one.
            "verification_mode": "no_checks",
        },
    )


SOURCES = {
    "wikitext2": Source(
        calibration=Part(_wikitext2, "train", "\n\n"),
        evaluation=Part(_wikitext2, "test", "\n\n"),
    ),
    "ptb": Source(
        calibration=Part(_ptb, "train", "\n\n"),
        evaluation=Part(_ptb, "validation", "\n\n"),
    ),
    "ptb-new": Source(
        calibration=Part(_ptb, "train", " "),
        evaluation=Part(_ptb, "test", " "),
    ),
    "c4": Source(
        calibration=Part(_c4, "train", None),
        evaluation=Part(_c4, "validation", None, windows=256),
    ),
    "c4-new": Source(
        calibration=Part(_c4, "train", None),
        evaluation=Part(_c4, "validation", " ", documents=1100, windows=256),
    ),
    "pydoc": Source(
        calibration=Part(pydoc_documents, "train", "\n\n"),
        evaluation=Part(pydoc_documents, "test", "\n\n"),
    ),
}


def _download(name: str, column: str, *calls: dict[str, Any]) -> Sequence[str]:
    """One column of a data set on the hub, or in its local cache; the first call that works."""
    failures = []
    reach_hub(f"data set {name}")
    for call in calls:
        try:
            import datasets

            return datasets.load_dataset(**call)[column]
        except Exception as error:  # the hub's errors share no class: network, cache, parser, ...
            failures.append(f"{call['path']}: {type(error).__name__}: {one_line(error)}")
    raise Unavailable(
        f"{name}: not to be had from the hub ({'; '.join(failures)}); name a local .txt, .jsonl or "
        ".parquet file, use pydoc, or fill the hub's cache elsewhere and set HF_HUB_OFFLINE=1"
    )
