"""CUDA C++ compiled at first use by nvcc and called through ctypes, as native.py does with C++.

A library is compiled for the one architecture of the device and kept in the same cache. Launches go
to torch's current stream and return at once. Where there is no nvcc, or it fails, torch computes
on the device by itself, and one line in the log says why.
"""

import ctypes
import importlib.util
import logging
import os
import re
import shutil
import subprocess
from ctypes import c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from quip.errors import how_to_install
from quip.kernels import native

log = logging.getLogger(__name__)
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


@cache
def available(source: Path) -> bool:
    """Whether torch has a CUDA device, and the source compiles for all of them and their driver."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    kinds = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return _driver_serves() and all(native.library(source, Nvcc(kind)) for kind in kinds)


@cache
def _driver_serves() -> bool:
    """Whether the driver runs what nvcc makes: of its own major version, or an older one."""
    try:
        compiler = Nvcc((0, 0)).compiler()
        said = subprocess.run((*compiler, "--version"), capture_output=True, text=True, check=False)
    except OSError:
        return True  # the library says why there is none
    release, driver = re.search(r"release \d+", said.stdout), _driver_version()
    if release is None or driver is None:
        return True
    major, minor = driver // 1000, driver % 1000 // 10
    if release[0] in {f"release {older}" for older in range(major + 1)}:
        return True
    log.warning(
        "CUDA kernels: torch does their work, more slowly: %s is of %s, and the driver serves "
        "CUDA %d.%d; update the driver, or name the folder of an older toolkit in CUDA_HOME",
        compiler[0],
        release[0],
        major,
        minor,
    )
    return False


def _driver_version() -> int | None:
    """What CUDA the driver serves, as 1000 major + 10 minor; None where it does not say."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value


@cache  # asked for each call, and so is `block_bytes`
def processors(device: torch.device) -> int:
    """How many thread blocks run at once on a device, at one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def block_bytes(device: torch.device) -> int:
    """Shared memory that a thread block may have: CUDA keeps 1,024 bytes of a multiprocessor's."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024


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
