"""CUDA C++ compiled for the host, where tests run its arithmetic without a device."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

HEADER = Path(__file__).with_name("cuda_on_host.h")
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-x", "c++", "-include", str(HEADER))

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@cache
def library(source: Path) -> ctypes.CDLL:
    """The source with HEADER in the place of quip/kernels/device.cuh."""
    with tempfile.TemporaryDirectory(prefix="quip-test-") as folder:
        path = Path(folder) / "host.so"
        subprocess.run(["g++", *FLAGS, str(source), "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))


def launch(source: Path, name: str, device: object, *args: object) -> None:
    """What quip/kernels/cuda.py's `launch` does, one thread after the other."""
    assert getattr(library(source), name)(*args, None) == 0
