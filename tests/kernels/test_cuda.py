"""Compiling for a GPU, with a compiler that stands in for nvcc: no device is needed."""

import logging
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quip.kernels import cuda, native
from tests.support.emulation import needs_compiler

COMPILES = 'for last; do :; done\ng++ -shared -fPIC -x c++ "$source" -o "$last"'


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A GPU of capability 9.0, as far as torch says, and nothing compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "_driver_version", lambda: 13000)
    forget()
    yield
    forget()


def forget():
    """What a process keeps of what it has compiled, and of what it cannot compile."""
    for kept in (native.library, cuda.available, cuda._driver_serves):
        kept.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "two.cu"
    path.write_text('extern "C" int two() { return 2; }\n')
    return path


def stand_in(tmp_path, script):
    """An nvcc in CUDA_HOME: $source is what it is asked to compile; it notes how it is called."""
    path = tmp_path / "toolkit" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    say = 'case "$*" in --version) echo release 13; exit;; esac'
    find = 'for word; do case "$word" in *.cu) source=$word;; esac; done'
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n{say}\n{find}\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def compilations(tmp_path):
    return [x for x in (tmp_path / "called").read_text().splitlines() if x != "--version"]


@needs_compiler
def test_a_library_is_compiled_for_the_device_and_kept(device, source, tmp_path):
    stand_in(tmp_path, COMPILES)
    for _ in range(2):
        assert cuda.available(source)
        assert cuda.library(source).two() == 2
        forget()
    (line,) = compilations(tmp_path)
    assert "-arch=sm_90 " in line
    names = sorted(path.suffix for path in (tmp_path / "cache" / "quip").iterdir())
    assert names == [".sha256", ".so"]


@needs_compiler
def test_each_kind_of_device_has_a_library_of_its_own(device, source, tmp_path, monkeypatch):
    stand_in(tmp_path, COMPILES)
    cuda.library(source)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    cuda.library(source)
    first, second = compilations(tmp_path)
    assert "-arch=sm_90 " in first
    assert "-arch=sm_80 " in second
    assert len(list((tmp_path / "cache" / "quip").glob("*.so"))) == 2


def test_without_nvcc_one_line_says_so(device, source, monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    with caplog.at_level(logging.INFO, logger="quip"):
        assert not cuda.available(source)
        assert not cuda.available(source)
    (line,) = caplog.messages
    assert "torch does its work, more slowly: no nvcc: pip install -e '.[cuda]'" in line


def test_an_nvcc_among_the_packages_of_python_is_found(tmp_path, monkeypatch):
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: name if Path(name).is_file() else None)
    monkeypatch.setattr(Path, "is_file", lambda path: path.is_relative_to(tmp_path))
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    assert cuda.Nvcc((9, 0)).compiler() == (str(nvcc),)


def test_what_nvcc_refuses_is_left_to_torch(device, source, tmp_path, caplog):
    stand_in(tmp_path, "echo nvcc fatal: Unsupported gpu architecture >&2; exit 1")
    assert not cuda.available(source)
    (line,) = caplog.messages
    assert line.endswith("nvcc fatal: Unsupported gpu architecture")


def test_what_an_older_driver_cannot_run_is_left_to_torch(
    device, source, tmp_path, monkeypatch, caplog
):
    stand_in(tmp_path, COMPILES)
    monkeypatch.setattr(cuda, "_driver_version", lambda: 12040)
    assert not cuda.available(source)
    assert not cuda.available(source.with_name("other.cu"))
    (line,) = caplog.messages
    assert "is of release 13, and the driver serves CUDA 12.4; update the driver, or name" in line


def test_a_driver_that_does_not_say_is_believed(monkeypatch):
    assert cuda._driver_version() is None or torch.version.cuda
    monkeypatch.setattr(
        "ctypes.CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=lambda _: 999)
    )
    assert cuda._driver_version() is None


def test_a_kernel_serves_all_devices_or_none(device, source, tmp_path, monkeypatch):
    refuses = 'case "$*" in *sm_80*) echo no such device >&2; exit 1;; esac\n'
    stand_in(tmp_path, refuses + COMPILES)
    assert cuda.available(source)
    forget()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at=0: [(9, 0), (8, 0)][at or 0])
    assert not cuda.available(source)


def test_without_a_device_nothing_is_compiled(source, monkeypatch, caplog):
    forget()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not cuda.available(source)
    forget()
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # AMD's devices say so too
    assert not cuda.available(source)
    assert caplog.messages == []


def test_threads_launch_in_turn(source, monkeypatch):
    inside, seen = [], []

    def two(*_):
        inside.append(1)
        time.sleep(0.01)
        seen.append(len(inside))
        inside.pop()
        return 0

    monkeypatch.setattr(cuda, "library", lambda *_: SimpleNamespace(two=two))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "check_error", lambda status: None)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: cuda.launch(source, "two", torch.device("cuda")), range(4)))
    assert seen == [1] * 4
