"""CUDA C++ compiled at first use by nvcc and called through ctypes, as native.py does with C++.

A library is compiled for the one architecture of the device and kept in the same cache. Launches go
to torch's current stream and return at once. Where there is no nvcc, or it fails, torch computes
on the device by itself, and one line in the log says why.
"""

import ctypes
import importlib.util
import os
import shutil
from ctypes import c_void_p
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from quip.errors import how_to_install
from quip.kernels import native

FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudadevrt=none")
# Launches of all threads in turn: how much shared memory a kernel may have is set before each, and
# ctypes lets other threads run meanwhile.
LAUNCHING = Lock()


@dataclass(frozen=True)
class Nvcc(native.Toolchain):
    """CUDA C++ for devices of one compute capability."""

    capability: tuple[int, int]

    def compiler(self) -> tuple[str, ...]:
        for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
            if folder and (path := shutil.which("nvcc", path=str(Path(folder, "bin")))):
                return (path,)
        for path in map(shutil.which, ("nvcc", "/usr/local/cuda/bin/nvcc", *_packaged())):
            if path:
                return (path,)
        raise FileNotFoundError(
            f"no nvcc: {how_to_install('cuda')}, or name the folder of a CUDA toolkit in CUDA_HOME"
        )

    def flags(self) -> tuple[str, ...]:
        major, minor = self.capability
        return (*FLAGS, f"-arch=sm_{major}{minor}")

    def target(self) -> str:
        return ""  # the flags name it


def _packaged() -> list[str]:
    """Each nvcc among the packages of this Python, the latest first."""
    found = importlib.util.find_spec("nvidia")
    folders = (found and found.submodule_search_locations) or ()
    paths = [path for folder in folders for path in Path(folder).glob("cu*/bin/nvcc")]
    return sorted(map(str, paths), reverse=True)


def library(source: Path, device: torch.device | None = None) -> ctypes.CDLL | None:
    """The source compiled for a device, else for the current one; None where that fails."""
    return native.library(source, Nvcc(torch.cuda.get_device_capability(device)))


def available(source: Path) -> bool:
    """Whether torch has a CUDA device at hand, and the source compiles for it."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return library(source) is not None


def launch(source: Path, name: str, device: torch.device, *args: Any) -> None:
    """Call int NAME(*args, stream) of a source on the device's current stream, and do not wait.

    Raises torch.cuda.CudaError where the driver refuses.
    """
    native_library = library(source, device)
    assert native_library is not None
    with torch.cuda.device(device), LAUNCHING:
        stream = torch.cuda.current_stream(device).cuda_stream
        status = getattr(native_library, name)(*args, c_void_p(stream))
    torch.cuda.check_error(status)


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor begins, for a field of type c_void_p."""
    return None if tensor is None else tensor.data_ptr()
