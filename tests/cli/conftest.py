"""A working directory for command lines, and what they ask for without running it."""

import pytest

from quip import run as door
from tests.support.runs import write_text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with two texts and a folder in use."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "train.txt")
    write_text(tmp_path / "test.txt")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    return tmp_path


@pytest.fixture
def asked(monkeypatch, capsys):
    """asked([words]) -> the Experiment that the command line asks for, without running it."""

    def call(words: list[str], main=door.main):
        caught = []
        monkeypatch.setattr("quip.jobs.run.run_experiment", lambda e: caught.append(e) or {})
        monkeypatch.setattr("quip.jobs.report.text.table", lambda report: "")
        assert main(words) == 0, capsys.readouterr().err
        return caught[0]

    return call
