"""scripts/bench_gpu.py without a GPU: its sections at tiny sizes, its limits, and its record."""

import ast
import importlib.util
import json
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SECTIONS = ROOT / "scripts" / "dev" / "gpu"


def load(path: Path):
    """A script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def section(monkeypatch, capsys):
    """section(name): the rows of a section on the CPU."""

    def call(name: str) -> list[dict]:
        monkeypatch.syspath_prepend(SECTIONS)
        monkeypatch.setattr(sys, "argv", [name, "--device", "cpu"])
        runpy.run_path(str(SECTIONS / f"{name}.py"), run_name="__main__")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


@pytest.fixture
def tables(monkeypatch):
    """The tables of a record in Markdown, by section."""
    monkeypatch.syspath_prepend(SECTIONS.parent)
    module = load(SECTIONS.parent / "gpu_tables.py")

    def render(name: str, rows: list[dict]) -> str:
        done = {"commit": "abc", "rows": rows, "ended": "done"}
        record = {"device": "CPU", "versions": {"torch": "2", "cuda": None}}
        return module.of_gpu({**record, "sections": {name: done}})

    return render


def test_second_moments_and_factorisations(section, tables):
    rows = section("hessian")
    assert [row["what"] for row in rows[:3]] == [
        f"second moments, {kind}" for kind in ("bfloat16", "float16", "float32")
    ]
    assert all(row["error"] < 1e-5 for row in rows[:3])
    assert len(rows) == 7
    assert "| Cholesky in float64 | 96 |" in tables("hessian", rows)


def test_a_block_is_timed_by_its_stages(section, tables):
    enter, observe, *recipes = section("block")
    assert enter["windows_at_once"] == 128
    assert [row["recipe"] for row in recipes] == [
        *("int 4", "gptq 4 g128", "int 2", "E8P12", "E8P12RVQ4B")
    ]
    for row in recipes:
        whole = observe["seconds"] + row["quantize"] + row["replay"]
        assert row["block"] == pytest.approx(whole, abs=1e-3)
        assert row["model_s"] == pytest.approx(32 * whole, abs=0.1)
    assert "| E8P12RVQ4B |" in tables("block", [enter, observe, *recipes])


def test_steps_of_decoding_are_carried_forward(section, tables):
    rows = section("decode")
    assert [row["code"] for row in rows] == ["bfloat16, dense", "int 4", "E8P12"]
    assert rows[0]["over_bf16"] == 1
    assert "| E8P12 | 1 |" in tables("decode", rows)


def test_a_section_without_a_table_of_its_own_shows_its_rows(tables):
    text = tables("other", [{"n": 4096, "us": 2.5}, {"n": 11008, "error": 1e-3}])
    assert "| n | us | error |\n|---|---|---|\n| 4096 | 2.5 | - |\n| 11008 | - | 0.001 |" in text
    assert "\n(One run, commit abc.)\n" in text


def test_what_is_wrong_is_said_of_forms(tables):
    right = {"form": "a cuda", "cases": 3, "right": True, "said": "right"}
    wrong = {"form": "b cuda", "cases": 2, "right": False, "said": "AssertionError: off"}
    text = tables("forms", [{"source": "a/cuda.cu", "compile_s": 9.0}, right, wrong])
    assert "Of 2 kernels on the device 1 computed" in text
    assert "`b cuda`: AssertionError: off." in text


# The script


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """bench(*words) -> status, with sections of its own in a folder."""
    module = load(ROOT / "scripts" / "bench_gpu.py")
    folder = tmp_path / "scripts" / "dev" / "gpu"
    folder.mkdir(parents=True)
    for name, code in {
        "forms": "print('a library says hello'); print('{\"right\": 1}')",
        "panel": "import time\nprint('{\"ms\": 1}', flush=True)\ntime.sleep(60)",
        "block": "raise SystemExit(3)",
    }.items():
        (folder / f"{name}.py").write_text(code)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "SECTIONS", ["forms", "panel", "block"])

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--commit", "abc", *words])
        return module.main()

    return call


def test_a_section_that_hangs_or_dies_costs_its_own_rows_alone(bench, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    words = ("--device", "cpu", "--out", str(out), "--minutes")
    assert bench(*words, "0.02") == 1
    record = json.loads(out.read_text())
    found = {name: (one["rows"], one["ended"]) for name, one in record["sections"].items()}
    assert found["forms"] == ([{"right": 1}], "done")
    assert found["panel"][0] == [{"ms": 1}]
    assert found["panel"][1].startswith("stopped at its limit of ")
    assert "block" not in found
    assert "block: failed with status 3 after" in capsys.readouterr().out


def test_what_was_recorded_before_stays_until_it_is_measured_again(bench, tmp_path):
    out = tmp_path / "gpu.json"
    words = ("--device", "cpu", "--out", str(out), "--only")
    assert bench(*words, "forms") == 0
    record = json.loads(out.read_text())
    old = {"commit": "old", "rows": [{"ms": 5}], "ended": "done"}
    record["sections"] |= {"block": old, "forms": old}
    out.write_text(json.dumps(record))
    assert bench(*words, "forms", "block") == 1
    sections = json.loads(out.read_text())["sections"]
    assert sections["block"] == old
    assert sections["forms"]["commit"] == "abc"
    out.write_text(json.dumps({**record, "device": "another card"}))
    assert bench(*words, "forms") == 0
    assert list(json.loads(out.read_text())["sections"]) == ["forms"]


def test_a_dry_run_records_nothing_unless_it_is_told_where(bench, tmp_path):
    assert bench("--device", "cpu", "--only", "forms") == 0
    assert not list(tmp_path.glob("**/*.json"))


def test_an_interruption_leaves_no_section_behind(bench, monkeypatch):
    started = []

    class Watched(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Watched)
    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench("--device", "cpu", "--only", "panel")
    assert started[-1].returncode == -signal.SIGKILL  # the first one asked git for the commit
    limits = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for thread in limits:  # for which Python would wait
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in limits)


def test_what_is_missing_is_said_in_one_line(bench, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "xxhash" or None)
    assert bench("--device", "cpu") == 2
    assert capsys.readouterr().err == "bench_gpu: missing packages: pip install xxhash\n"
    if not torch.cuda.is_available():
        assert bench() == 2
        assert "say --device cpu for a dry run\n" in capsys.readouterr().err


def test_correctness_comes_first_and_every_section_is_run():
    names = load(ROOT / "scripts" / "bench_gpu.py").SECTIONS
    assert names[:2] == ["forms", "model"]
    assert sorted(names) == sorted(p.stem for p in SECTIONS.glob("[a-z]*.py"))


# The tests for a GPU, where little more than torch is installed

KNOWN = {"jaxtyping", "numpy", "pytest", "safetensors", "tokenizers", "torch", "transformers"}
KNOWN |= {"hypothesis", "scipy"}  # without which a file is left out, and said to be


def reached(path: Path, seen: set[Path]) -> set[str]:
    """The packages that a test imports, by itself or by what it imports of tests."""
    packages: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in getattr(node, "names", ())]
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        elif not isinstance(node, ast.Import):
            continue
        for name in names:
            packages.add(name.partition(".")[0])
            inside = [ROOT.joinpath(*name.split(".")[:n]).with_suffix(".py") for n in (2, 3)]
            for other in inside:
                if name.startswith("tests.") and other.exists() and other not in seen:
                    seen.add(other)
                    packages |= reached(other, seen)
    return packages


def test_tests_for_a_gpu_import_nothing_that_only_others_need():
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path != Path(__file__)]
    needed = {path.name: reached(path, set()) for path in files if "mark.gpu" in path.read_text()}
    assert len(needed) > 8
    known = {*sys.stdlib_module_names, *KNOWN, "quip", "tests"}
    assert {name: found - known for name, found in needed.items() if found - known} == {}


@pytest.mark.slow
def test_a_dry_run_of_everything_ends_well(monkeypatch, tmp_path):
    module, out = load(ROOT / "scripts" / "bench_gpu.py"), tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--device", "cpu", "--out", str(out)])
    assert module.main() == 0
    record = json.loads(out.read_text())
    assert {one["ended"] for one in record["sections"].values()} == {"done"}
    assert list(record["sections"]) == module.SECTIONS
