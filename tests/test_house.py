"""The house keeps its plan: its rooms, the length of its files, its docstrings, and its tests."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOUSE, TESTS = ROOT / "quip", ROOT / "tests"
ROOMS = {
    *("cli", "research", "jobs", "serve", "evaluate", "model", "data", "matrix", "packed"),
    *("codebooks", "transforms", "kernels"),
}
GROUND = {"errors.py", "files.py", "stored.py", "reading.py", "shapes.py"}
DOORS = {"__init__.py", "__main__.py", "lm_eval.py", "run.py", "py.typed"}
LINES = 250

FILES = sorted(HOUSE.rglob("*.py"))
TEST_FILES = sorted(TESTS.rglob("*.py"))


def folders(path: Path) -> set[str]:
    return {x.name for x in path.iterdir() if x.is_dir()} - {"__pycache__"}


def test_the_top_floor_is_twelve_rooms_five_stones_and_the_doors():
    assert folders(HOUSE) == ROOMS
    assert {x.name for x in HOUSE.iterdir() if x.is_file()} | DOORS == GROUND | DOORS


def test_no_file_is_longer_than_a_person_reads_in_one_go():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: n for name, n in lengths.items() if n > LINES} == {}


# Docstrings

# What begins like this is understood only by who has read its neighbour.
NEIGHBOURLY = re.compile(r"(Those|These|They|It|Of|The same|That of)\b")


def neighbourly(code: str) -> Iterator[str]:
    """Names and first lines of the docstrings that need their neighbour."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(node) or ""
            if NEIGHBOURLY.match(text):
                yield f"{node.name}: {text.splitlines()[0]}"


def test_every_docstring_stands_alone():
    found = {str(path.relative_to(ROOT)): list(neighbourly(path.read_text())) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_docstring_that_needs_its_neighbour_is_found():
    code = 'class A:\n    """Often."""\n    def _f(self):\n        """Of a matrix.\n\n        W."""'
    assert list(neighbourly(code)) == ["_f: Of a matrix."]


# Tests


def test_the_tests_mirror_the_packages():
    assert folders(TESTS) - {"support"} <= ROOMS
    names = [path.name for path in TEST_FILES if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))
    assert not [path for path in (TESTS / "support").rglob("*.py") if path.stem.startswith("test_")]


def imported(code: str) -> Iterator[str]:
    """Dotted names of what is imported."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_test_imports_another_test():
    found = [(path.name, name) for path in TEST_FILES for name in imported(path.read_text())]
    assert [x for x in found if re.match(r"tests\.(\w+\.)*test_", x[1])] == []


def test_packed_weights_are_computed_with_without_what_made_them():
    code = (
        "import sys, quip.packed.linear, quip.packed.stack, quip.packed.checkpoint\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('quip.')}\n"
        "print(*sorted(rooms & {'matrix', 'model', 'data', 'jobs', 'research', 'cli'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
