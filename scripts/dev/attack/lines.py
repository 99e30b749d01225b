"""Mistyped command lines: nasty values, flags of other commands, files that are none."""

import os
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from attack.children import Child, command
from quip.cli import COMMANDS
from quip.cli.parse import Parser

VALUES = (
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "nan",
        "inf",
        "1e400",
        "9" * 20,
        "99999999999",
        "0x10",
        "1.5",
        "None",
    ),
    *(
        "true",
        "[]",
        "{}",
        "a,b",
        ",",
        "%s",
        "\n",
        "ä",
        "\udcff",
        "x" * 300,
        "y" * 70_000,
        "../..",
        "~",
    ),
    *("/dev/null", "/dev/zero", "/proc/self/mem", "/", "pipe", "loop", "folder", "empty", "bytes"),
    *("bomb.yaml", "deep.json", "demo", "no/such", "http://x/y", "-", "--", "cuda:99", "2,3", "*"),
)
FILES = {
    "empty": b"",
    "bytes": bytes(range(128, 256)) * 9,
    "bomb.yaml": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        b"b%d: &b%d [%s]\n" % (i, i, b",".join([b"*b%d" % (i - 1) if i else b"*a"] * 9))
        for i in range(12)
    ),
    "deep.json": b"[" * 100_000,
    "text.txt": b"The quick brown fox jumps over the lazy dog. " * 400,
}
SMALL = ["--nsamples", "1", "--seqlen", "16"]
LINES = {
    "run": ["demo", "text.txt", *SMALL, "--eval_datasets", "none", "--wbits", "2"],
    "hessians": ["demo", "text.txt", *SMALL, "--save", "store"],
    "proxy": ["demo", "store", "--quant", "nearest", "--wbits", "2", "--layers", "*.0.fc1"],
    "summary": ["store"],
    "counterexample": ["--n", "8"],
    "equivalence": ["--n", "8", "--wbits", "2"],
    "theory": ["--n", "4", "--rows", "50", "--samples", "2", "--only", "lemma2"],
    "table": ["perplexity", "--models", "demo", "--dry_run"],
    "finetune": [
        "saved",
        "text.txt",
        "--save",
        "tuned",
        "--epochs",
        "1",
        *SMALL[:1],
        "4",
        *SMALL[2:],
    ],
    "evaluate": ["saved", "--datasets", "text.txt", *SMALL],
    "generate": ["saved", "The", "--max_new_tokens", "2"],
    "inspect": ["saved"],
    "export": ["saved", "exported", "--dense"],
    "import-quip-sharp": ["saved", "imported"],
    "import-exl3": ["saved", "imported"],
    "import-gptq": ["saved", "imported"],
    "import-compressed-tensors": ["saved", "imported"],
    "recipes": [],
}


def mistyped(work: Path, count: int, seed: int) -> Iterator[Child]:
    """The cases, each of a generator of its own."""
    for number in range(count):
        rng = random.Random(f"{seed} line {number}")
        words = _line(rng)
        yield Child(
            kind="command line",
            what="quip " + " ".join(word[:60] + "..." * (len(word) > 60) for word in words),
            folder=work / "line" / str(number),
            prepare=partial(_prepare, work / "base"),
            act=partial(_call, words),
        )


def _prepare(base: Path, folder: Path) -> None:
    shutil.copytree(base / "int" / "saved", folder / "saved")
    shutil.copytree(base / "store", folder / "store")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")


def _call(words: list[str], folder: Path) -> None:
    command(*words)


def _line(rng: random.Random) -> list[str]:
    name = rng.choice(list(LINES))
    words = [name, *LINES[name]]
    for _ in range(rng.choice((1, 1, 2, 3))):
        turn = rng.randrange(10)
        if turn == 0 and len(words) > 1:
            words[rng.randrange(1, len(words))] = rng.choice(VALUES)
        elif turn == 1 and len(words) > 1:
            del words[rng.randrange(1, len(words))]
        elif turn == 2:
            words.append(rng.choice(VALUES))
        else:
            own = _flags(name if rng.random() < 0.9 else rng.choice(list(LINES)))
            words += _given(rng.choice(own), rng)
    return words


def _flags(name: str) -> list[Any]:
    parser = Parser(prog=name)
    COMMANDS[name].build(parser)
    return [x for x in parser._actions if x.option_strings and x.dest != "help"]


def _given(action: Any, rng: random.Random) -> list[str]:
    flag = rng.choice(action.option_strings)
    if action.nargs == 0:
        return [flag]
    fit = [str(x) for x in action.choices or ()]
    value = rng.choice(fit) if fit and rng.random() < 0.3 else rng.choice(VALUES)
    return [f"{flag}={value}"] if rng.random() < 0.7 else [flag, value]
