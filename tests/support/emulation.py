"""CUDA C++ on the CPU: the sources of the kernels compiled against tests/support/emulated."""

import ctypes
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quip.kernels import cuda, native
from quip.kernels.operation import Operation

HEADERS = Path(__file__).with_name("emulated")
COMPILER = shutil.which("g++")
aten = torch.ops.aten
READS = (
    *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten.repeat_interleave.Tensor),
)

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


def prefer_cuda(monkeypatch: pytest.MonkeyPatch, *operations: Operation[..., Any]) -> None:
    """Have operations computed by their forms for CUDA, whatever these say that they serve."""
    for operation in operations:
        monkeypatch.setattr(operation, "reference", operation.forms["cuda"].compute)
        monkeypatch.setattr(operation, "forms", {})


class NothingRead(TorchDispatchMode):
    """Within it, a number of a tensor that Python asks for is an error: on a GPU it would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} waits for the device"
        return func(*args, **kwargs or {})
