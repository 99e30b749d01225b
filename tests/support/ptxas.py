"""What nvcc makes of a kernel: registers, spills and stack, as ptxas tells them."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from quip.kernels.cuda import Nvcc

OLDER = pytest.param((8, 0), marks=pytest.mark.slow)  # A100
CAPABILITIES = [OLDER, (9, 0)]  # and H100
LIBRARY = "library.so"


@dataclass(frozen=True)
class Compiled:
    """One kernel of a source."""

    name: str  # mangled
    registers: int
    spilled: int  # bytes stored and loaded
    stack: int  # bytes


def kernels(source: Path, capability: tuple[int, int], folder: Path) -> list[Compiled]:
    """All kernels of a source for one compute capability; skips the test where nvcc is not.

    What they are compiled to is the library LIBRARY of the folder.
    """
    compiler, flags = require_nvcc(capability)
    command = [*compiler, *flags, "-Xptxas=-v", str(source), "-o", str(folder / LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return list(map(_read, done.stderr.split("Compiling entry function")[1:]))


def require_nvcc(capability: tuple[int, int]) -> tuple[tuple[str, ...], list[str]]:
    """The compiler and its flags; skips the test where there is none."""
    nvcc = Nvcc(capability)
    try:
        return nvcc.compiler(), list(nvcc.flags())
    except FileNotFoundError as error:
        pytest.skip(str(error))


def _read(said: str) -> Compiled:
    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        assert found is not None, said
        return int(found[1])

    name = re.search(r"'(\w+)'", said)
    assert name is not None, said
    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    stack = number(r"(\d+) bytes stack frame")
    return Compiled(name[1], number(r"Used (\d+) registers"), spilled, stack)
