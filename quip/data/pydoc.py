"""The documentation inside every CPython: its help topics and its docstrings, without a download.

One document is one help topic or one module of the standard library. Modules are parsed, never
imported, so the text is the same whatever the machine can import. It does differ between Python
versions, like any data set between releases: the hash in a report tells them apart.
"""

import ast
import gc
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path

from quip.errors import Unavailable

# Not documentation: tests, demonstrations, programs, tables and the topics' own module.
SKIPPED = {"encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}

TEST_SHARE = 0.1

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def pydoc_documents(split: str) -> list[str]:
    """The texts of one split, `train` or `test`, in the order of their names' hashes.

    A document's name alone decides its split and its place: another Python version moves none,
    and the first windows of a split are a fair sample of topics and modules.
    """
    documents = _documents()
    position = {name: int.from_bytes(sha256(name.encode()).digest()[:8]) for name in documents}
    border = TEST_SHARE * 2**64
    names = [n for n in documents if (position[n] < border) == (split == "test")]
    return [documents[name] for name in sorted(names, key=position.__getitem__)]


@cache
def _documents() -> dict[str, str]:
    """Every document by name."""
    topics, modules = _topics(), _modules()
    if not topics or not modules:
        missing = "pydoc_data.topics" if not topics else "the standard library's source files"
        raise Unavailable(
            f"pydoc: this Python {sys.version.split()[0]} comes without {missing}; "
            "install its full standard library or name a local text file instead"
        )
    named = [(f"topic {name}", text) for name, text in topics.items()]
    named += [(f"module {name}", text) for name, text in modules.items()]
    first = {text: name for name, text in reversed(named)}  # some modules are copies of others
    return {name: text for name, text in named if first[text] == name}


def _topics() -> dict[str, str]:
    """Help topics, without those that repeat a section of a longer one.

    The repeats would put one text into both splits.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        body = topics[name].split("\n", 3)[-1].strip()  # the heading's underline tells its depth
        if not any(body in text for text in kept.values()):
            kept[name] = topics[name].strip()
    return kept


def _modules() -> dict[str, str]:
    """Modules by dotted name: each one's docstring and those of its classes and functions."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or not SKIPPED.isdisjoint(parts):
            continue
        with _quiet_parsing():
            tree = ast.parse(path.read_bytes(), filename=str(path))
        if text := "\n\n".join(_docstrings(tree)):
            modules[".".join(parts).removesuffix(".__init__")] = text
    return modules


@contextmanager
def _quiet_parsing() -> Iterator[None]:
    """Without warnings about old escapes, and without searching new trees for garbage.

    A tree has no cycles, but its many objects would set off collections that take longer than
    the parsing itself.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        if collecting:
            gc.enable()


def _docstrings(node: ast.AST, scope: str = "") -> Iterator[str]:
    """The docstrings below a node in source order, each under the signature that it documents."""
    if isinstance(node, ast.Module) and (text := ast.get_docstring(node)):
        yield text.strip()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            if text := ast.get_docstring(child):
                yield f"{_signature(child, scope)}\n{text.strip()}"
            yield from _docstrings(child, f"{scope}{child.name}.")
        elif not isinstance(child, ast.expr):  # most of a tree, and never a definition
            yield from _docstrings(child, scope)


def _signature(node: Definition, scope: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {scope}{node.name}({bases})"
    return f"def {scope}{node.name}({ast.unparse(node.args)})"
