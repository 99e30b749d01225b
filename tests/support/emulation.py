"""CUDA C++ on the CPU: the sources of the kernels compiled against tests/support/emulated."""

import ctypes
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from quip.kernels import cuda, native

HEADERS = Path(__file__).with_name("emulated")
COMPILER = shutil.which("g++")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++")


@dataclass(frozen=True)
class Host(native.Toolchain):
    """g++, for which a .cu is C++ with a header that says what CUDA means."""

    def compiler(self) -> tuple[str, ...]:
        assert COMPILER is not None
        return (COMPILER,)

    def flags(self) -> tuple[str, ...]:
        options = ("-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas")
        return (*options, f"-I{HEADERS}", "-x", "c++", "-include", "device.h")

    def target(self) -> str:
        return "".join(path.read_text() for path in sorted(HEADERS.iterdir()))


def launch(source: Path, name: str, device: torch.device, *args: Any) -> None:
    """`quip.kernels.cuda.launch` for tensors on the CPU."""
    assert device.type == "cpu"
    library = native.library(source, Host())
    assert library is not None
    assert getattr(library, name)(*args, ctypes.c_void_p(None)) == 0


@pytest.fixture
def emulated(monkeypatch):
    """Kernels for CUDA are computed by the CPU, if they are called by name."""
    monkeypatch.setattr(cuda, "launch", launch)
