"""What the documents say is so: code runs, flags, tests and links exist, tables match."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from quip.cli import COMMANDS
from quip.cli.parse import Parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [path for path in [README, *sorted((ROOT / "docs").glob("*.md"))] if path.exists()]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in DOCUMENTS
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


def test_every_flag_of_the_command_is_in_the_readme():
    text = README.read_text()
    missing = {flag for flag in flags() - {"--help"} if not re.search(rf"{flag}\b", text)}
    assert not missing


# Of other programs: pip, and the scripts.
FOREIGN = {"--editable", "--constraint", "--quiet", "--check"}


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


@pytest.mark.skipif("<!-- table" not in README.read_text(), reason="no tables in the README")
def test_the_tables_of_the_documents_are_those_of_the_results():
    command = [sys.executable, str(ROOT / "scripts" / "dev" / "render_results.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
