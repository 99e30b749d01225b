"""`torchrun -m quip.run`: one checkpoint, one report and one voice, whatever the processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quip.cli import ends
from quip.cli.lines import MOMENT
from quip.model import load_streamed
from quip.run import main
from tests.support.processes import in_processes
from tests.support.runs import save_model, write_text

FLAGS = ("--wbits", "2", "--incoh_processing", "--nsamples", "600", "--seqlen", "16")  # 3 batches
# Run by each process in place of `-m quip.run`: the second one dies in the second block.
DYING = """
import os, signal, sys
from quip.model import siblings
from quip.run import main

record, seen = siblings._record, []

def dying(*args, **options):
    found = record(*args, **options)
    seen.append(found.block)
    if os.environ["RANK"] == "1" and found.block == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

siblings._record = dying
sys.exit(main())
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """A model, its texts and how to quantize it, as words of a line."""
    folder = tmp_path_factory.mktemp("given")
    model = save_model(folder / "opt")
    texts = [write_text(folder / name, 12_000) for name in ("train.txt", "test.txt")]
    return [model, texts[0], *FLAGS, "--eval_datasets", texts[1], "--eval_nsamples", "4"]


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory) -> dict[str, Any]:
    """What one process leaves behind."""
    folder = tmp_path_factory.mktemp("alone")
    assert main([*given, *places(folder)]) == 0
    return left_in(folder)


def places(folder: Path) -> list[str]:
    return ["--out", str(folder / "out"), "--save", str(folder / "save")]


def left_in(folder: Path) -> dict[str, Any]:
    """The bytes of a checkpoint's weights and config, and what its report says but for seconds."""
    report = json.loads((folder / "out" / "run.json").read_text())
    for name in ("seconds", "peak_memory", "flags"):
        del report[name]
    for matrix in report["matrices"]:
        del matrix["seconds"]
    files = [*(folder / "save").glob("*.safetensors"), folder / "save" / "config.json"]
    return {"report": report} | {path.name: path.read_bytes() for path in files}


def torchrun(size: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", str(size), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_processes_leave_what_one_does_and_say_it_once(given, alone, tmp_path):
    ran = torchrun(2, "-m", "quip.run", *given, *places(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert left_in(tmp_path) == alone
    assert ran.stdout.count("24 matrices at ") == 1
    assert ran.stderr.count("layers.3.fc2: ") == 1


def test_a_process_that_alone_is_short_of_memory_streams_to_the_same_bits(given, alone, tmp_path):
    def member() -> int:
        if os.environ["RANK"] == "1":
            load_streamed.free_host_bytes = lambda: 1
        return main([*given, "--save", str(tmp_path / "save")])

    assert in_processes(2, member) == [0, 0]
    saved = tmp_path / "save" / "model.safetensors"
    assert saved.read_bytes() == alone["model.safetensors"]


@pytest.fixture(scope="module")
def killed(given, tmp_path_factory) -> Path:
    """The folder of a run whose second process was killed while it quantized."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "dying.py").write_text(DYING)
    ran = torchrun(2, str(folder / "dying.py"), *given, *places(folder))
    assert ran.returncode != 0
    assert "Signal 9 (SIGKILL)" in ran.stderr
    kept = sorted(path.name for path in (folder / "out" / "blocks").glob("block-*"))
    assert kept == ["block-0000.safetensors"]
    return folder


@pytest.mark.slow
def test_one_process_takes_up_what_two_left_when_one_was_killed(given, alone, killed):
    assert main([*given, *places(killed), "--resume"]) == 0
    assert left_in(killed) == alone


@pytest.mark.slow
def test_three_processes_take_up_what_two_left_when_one_was_killed(given, alone, killed, tmp_path):
    (killed / "out").rename(tmp_path / "out")
    ran = torchrun(3, "-m", "quip.run", *given, *places(tmp_path), "--resume")
    assert ran.returncode == 0, ran.stderr
    assert left_in(tmp_path) == alone


def refusal(capfd, size: int, line: list[str], door=main) -> tuple[list[int], str]:
    """The statuses of so many processes with one line, and what they say together."""
    capfd.readouterr()
    statuses = in_processes(size, lambda: door(line))
    out, err = capfd.readouterr()
    assert out == ""
    return statuses, err


def test_more_processes_than_batches_are_refused_in_one_line(given, tmp_path, capfd):
    statuses, said = refusal(capfd, 4, given)
    assert statuses == [2] * 4
    assert said.count("quip: ") == 1
    assert "quip: 4 processes for 3 batches (600 windows, 256 at once): one would be idle" in said


def test_what_processes_collect_from_different_windows_is_refused(given, tmp_path, capfd):
    from quip.cli import main as door

    line = ["hessians", *given[:2], "--save", str(tmp_path / "store"), "--nsamples", "600"]
    statuses, said = refusal(capfd, 2, line, lambda x: door([*x, "--seed", os.environ["RANK"]]))
    assert statuses == [2, 2]
    assert "quip: the processes are not alike: asked for.seed: 0 in process 0 (" in said
    assert not (tmp_path / "store").exists()


def test_a_line_that_cannot_be_read_is_refused_once(capfd):
    statuses, said = refusal(capfd, 2, ["model"])
    assert statuses == [2, 2]
    assert said.splitlines() == [
        "quip: the following arguments are required: dataset (--help explains every flag)"
    ]


def test_a_process_that_still_starts_when_others_fail_ends_as_they_do(capfd):
    def door(line: list[str], real=ends.signal.set_wakeup_fd) -> int:
        def slow(*args, **options) -> None:
            time.sleep(3 * MOMENT)  # by then the first process has told why all end
            real(*args, **options)

        if os.environ["RANK"] == "1":
            ends.signal.set_wakeup_fd = slow
        return main(line)

    statuses, said = refusal(capfd, 2, ["model"], door)
    assert statuses == [2, 2]
    assert said.count("quip: ") == 1


def test_what_one_process_does_is_not_started_as_two(capfd):
    from quip.cli import main as door

    statuses, said = refusal(capfd, 2, ["inspect", "folder"], door)
    assert statuses == [2, 2]
    assert said.splitlines() == [
        "quip: quip inspect is done by one process, and torchrun started 2; start it without "
        "torchrun"
    ]
