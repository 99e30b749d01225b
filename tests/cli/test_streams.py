"""What is printed cannot fail: any encoding, readers that leave, full disks, interruptions."""

import ast
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from quip import cli
from quip.cli import recipes, streams
from quip.cli.parse import Arguments, _to_resume

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PATIENCE = 120  # seconds, for a process that ought to have ended


def run(*words: str, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "timeout": PATIENCE, "env": ENVIRONMENT} | options
    return subprocess.run([sys.executable, "-m", "quip", *words], cwd=ROOT, **options)


def test_no_file_prints_but_the_one_that_cannot_fail():
    found = [
        path.name
        for path in sorted((ROOT / "quip").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
    ]
    assert set(found) == {"streams.py", "__main__.py"}


def test_an_encoding_that_lacks_a_character_has_it_escaped():
    code = "from quip.cli import streams; streams.set_up_streams(); streams.say('1 ± 2'); "
    code += "streams.complain('\\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (b"1 \\xb1 2\n", b"\\udcff\n")


@pytest.mark.parametrize("words", [["recipes"], ["run", "--help"], ["--version"], []])
def test_a_reader_who_left_ends_a_command_quietly(words):
    read, write = os.pipe()
    os.close(read)
    try:
        done = run(*words, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_under_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = run("recipes", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.startswith(b"quip: standard output cannot be written (No space left")
    assert done.stderr.count(b"\n") == 1


def test_streams_that_were_closed_swallow_what_is_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["recipes"]) == 0
    assert cli.main(["zork"]) == 2


# Interruptions


@pytest.mark.parametrize("stage", ["yaml", "torch", "transformers"])
def test_an_interruption_of_imports_is_one_line(stage, tmp_path):
    """Ctrl-C as this module is imported, whatever imports it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {stage!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run("evaluate", "demo", "--datasets", "pydoc", env={**ENVIRONMENT, "PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (130, b"")
    assert done.stderr == b"quip: interrupted\n"


def test_an_interruption_names_resume_where_that_goes_on(quip, monkeypatch, tmp_path):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quip.jobs.run.run_experiment", interrupt)
    line = ["run", "demo", "pydoc", "--out", str(tmp_path / "run")]
    status, _, err = quip(*line, "--wbits", "2")
    assert status == 130
    assert err == [
        f"quip: interrupted; the same line with --resume goes on with what {tmp_path}/run holds "
        "by now"
    ]
    assert quip(*line)[2] == ["quip: interrupted"]  # of 16 bits nothing can be taken up
    assert quip("run", "demo", "pydoc", "--wbits", "2")[2] == ["quip: interrupted"]
    assert _to_resume(None) == ""
    assert "what DIR holds" in _to_resume(Arguments(save="DIR", resume=False, wbits=None))


def test_what_is_said_ends_where_nobody_reads(monkeypatch):
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    monkeypatch.setattr(streams, "_swallow_the_rest", lambda: None)
    with pytest.raises(streams.ReaderLeft):
        recipes.call(Arguments(json=False))
    streams.complain("x")  # nobody hears it


def test_an_interruption_that_a_library_took_for_its_own_failure_is_one(quip, monkeypatch):
    def lose(*_: object) -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # the signal comes before it is over
        raise ModuleNotFoundError("half a library")

    monkeypatch.setattr(recipes, "call", lose)
    assert quip("recipes") == (130, "", ["quip: interrupted"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(recipes, "call", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quip("recipes")
