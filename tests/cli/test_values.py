"""What cannot be looked up or counted is refused at the door: one line, exit 2, no long work."""

import os
from pathlib import Path

import pytest

from quip.cli.parse import Parser
from quip.cli.values import NAME_BYTES, bounded, seed, whole
from quip.errors import UsageError, shown

LONG = "x" * 300
RUN = "run demo pydoc --wbits 2 --incoh_processing"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{RUN} --npasses 99999999999", "argument --npasses: '99999999999' is too large"),
        (f"{RUN} --npasses 99999", "--npasses 99999: at most 10,000 make sense"),
        (f"{RUN} --range 12345678901234567890", "--range 12345678901234567890: say tensor, or"),
        (f"{RUN} --nsamples 99999999", "--nsamples 99999999: at most 1,000,000 make sense"),
        (f"{RUN} --activation_memory nan", "--activation_memory nan: at least 0 is needed"),
        (f"{RUN} --seed {'9' * 30}", "argument --seed: '999999999999999999999999999999' is too"),
        (f"{RUN} --seqlen {'9' * 5000}", "argument --seqlen: '9999"),
        ("counterexample --n 16,1000000", "--n 1000000: a matrix of 1,000,000 x 1,000,000 is"),
        (f"counterexample --n {'9' * 5000}", "--n: '9999"),
        ("counterexample --n 16 --rows 100000000", "--n 16: a matrix of 100,000,000 x 16 is"),
        ("counterexample --rows x", "argument --rows: 'x' is no whole number of at least 1"),
        ("equivalence --n 50000", "--n 50000: a matrix of 50,000 x 50,000 is beyond"),
        ("theory --n 64 --rows 9000000", "--n 64: a matrix of 9,000,000 x 64 is beyond"),
        (f"run {LONG} pydoc", "argument MODEL: 'xxx"),
        (f"run demo {LONG}", "argument DATASET: 'xxx"),
        (f"{RUN} --eval_datasets {LONG}", "--eval_datasets: 'xxx"),
        (f"{RUN} --save {LONG}", "argument --save: 'xxx"),
        (f"{RUN} --out a/{LONG}/b", "argument --out: 'a/xxx"),
        (f"{RUN} --hessians loop", "argument --hessians: 'loop' cannot be looked up (Too many"),
        ("generate loop/x hello", "argument model: 'loop/x' cannot be looked up (Too many"),
        ("run ~nobody-of-this-name pydoc", "argument MODEL: '~nobody-of-this-name': Could not"),
        ("inspect \udcff", "argument DIR: '\\udcff' is not UTF-8 text: convert it first"),
        (f"{RUN} --eval_datasets \udcff", "argument --eval_datasets: '\\udcff' is not UTF-8"),
        ("evaluate demo --datasets \udcff.txt", "argument --datasets: '\\udcff.txt' is not UTF-8"),
    ],
)
def test_one_line_and_no_work(quip, monkeypatch, tmp_path, line, message):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    status, out, err = quip(*line.split())
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"quip: {message}")
    assert len(err[0]) < 400


def test_a_name_leaves_room_for_those_made_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = Parser()
    parser.add_argument("--out", type=Path)
    name = "ä" * (NAME_BYTES // 2)
    assert parser.parse_args(["--out", name]).out.name == name
    with pytest.raises(UsageError, match="at most 200 bytes"):
        parser.parse_args(["--out", f"{name}x"])


def test_numbers_are_bounded_and_seeds_by_what_generators_take():
    assert whole("-999_999_999") == -999999999
    assert seed(str(2**63 - 1)) == 2**63 - 1
    for read, word in ((whole, "1000000000"), (seed, str(2**63)), (seed, "1" * 41)):
        with pytest.raises(UsageError):
            read(word)


def test_what_is_shown_is_one_line_of_at_most_200_characters():
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10**6)) <= 200
    assert shown("x" * 198) == repr("x" * 198)
    assert len(bounded("y" * 10**6)) < 1000
    assert bounded("z" * 1000) == "z" * 1000
