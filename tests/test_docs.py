"""What the documents say is so: code runs, flags, tests and links exist, tables match."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

from quip.cli import COMMANDS
from quip.cli.parse import Parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    if path.name != "CONTRIBUTING.md"  # whose code is followed in test_contributing.py
    for number, code in enumerate(FENCE.findall(path.read_text()), start=1)
]


@pytest.mark.parametrize("code", FENCES)
def test_the_python_of_the_documents_runs_as_it_stands(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<document>", "exec"), {"__name__": "__main__"})


def flags() -> set[str]:
    found = set()
    for command in COMMANDS.values():
        parser = Parser()
        command.build(parser)
        found |= {option for action in parser._actions for option in action.option_strings}
    return {option for option in found if option.startswith("--")}


def test_every_command_has_a_section_with_its_flags():
    text = (ROOT / "docs" / "commands.md").read_text()
    for name in COMMANDS:
        assert f"\n## quip {name}\n" in text
        assert f"<!-- docs command {name} -->\n" in text


# Of `quip` itself, and of other programs: pip, and the scripts.
FOREIGN = {"--version", "--editable", "--constraint", "--quiet", "--check", "--add", "--model_args"}
FOREIGN |= {"--output-dir", "--use-vq", "--nearest"}  # of scripts/gptvq/llama.py
FOREIGN |= {"--shrink", "--blocks"}  # of scripts/simulate_scale.py
FOREIGN |= {"--standalone", "--nproc-per-node", "--nnodes", "--node-rank"}  # of torchrun
FOREIGN |= {"--master-addr", "--master-port"}
FOREIGN |= {"--extra-index-url", "--enforce-eager"}  # of pip, and of vLLM
FOREIGN |= {"--tensor-parallel-size", "--pipeline-parallel-size"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_in_a_document_exists(path):
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", path.read_text()))
    assert named <= flags() | FOREIGN


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_and_link_in_a_document_exists(path):
    text = path.read_text()
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert [name for name in named if f"def {name}(" not in tests] == []
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_dotted_name_in_a_document_exists(path):
    for name in re.findall(r"`(quip\.[\w.]*\w)`", path.read_text()):
        if path.name != "CHANGELOG.md":  # which names what was, too
            resolve(name)


def resolve(name: str) -> object:
    """What a dotted name stands for: attributes of the longest module that it begins with."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        with suppress(ModuleNotFoundError):
            return reduce(getattr, parts[length:], import_module(".".join(parts[:length])))
    raise AssertionError(name)


@pytest.mark.parametrize("script", ["render_results.py", "render_docs.py"])
def test_what_is_rendered_is_up_to_date(script):
    command = [sys.executable, str(ROOT / "scripts" / "dev" / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_record_says_of_which_kind_it_is_and_no_path_of_a_machine():
    kinds = {"table", "run", "rounding", "search", "em", "vq", "kills", "gpu", "fuzz", "soak"}
    kinds |= {"decoding", "hadamard_block", "trellis_mse", "trellis_speed"}
    kinds |= {"forecast", "forecasts", "simulations", "trellis_decoding", "serving", "soak_server"}
    for path in (ROOT / "results").glob("*.json"):
        assert json.loads(path.read_text())["kind"] in kinds, path.name
        assert not re.search(r'"/\w', path.read_text()), path.name


def test_the_readme_is_a_page():
    text = README.read_text()
    assert len(text.splitlines()) < 180
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert max(len(line) for block in fenced for line in block.splitlines()) <= 98
    assert (ROOT / "docs" / "perplexity.svg").stat().st_size < 100_000
