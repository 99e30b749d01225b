"""C++ compiled at first use and called through ctypes: no build step, no torch headers.

The library is kept in the user's cache under a name that holds a hash of all it depends on:
source, flags, compiler and processor.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")  # where CXX is not set
ARM = platform.machine() in ("aarch64", "arm64")
FLAGS = (
    *("-std=c++17", "-O3", "-mcpu=native" if ARM else "-march=native", "-fno-math-errno"),
    *("-ffp-contract=fast", "-shared", "-fPIC"),
)
log = logging.getLogger(__name__)


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled source; None where that fails, and one line in the log says why."""
    try:
        return _load(source)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        first = next(iter(reason.strip().splitlines()), "it did not say why")
        log.warning("%s: torch does its work, more slowly: %s", _short(source), first)
        return None


def _short(source: Path) -> str:
    """The operation and the file, for a person."""
    return f"{source.parent.name}/{source.name}"


def _load(source: Path) -> ctypes.CDLL:
    compiler = _compiler()
    path = cache_folder() / f"{source.parent.name}-{_fingerprint(source, compiler)}.so"
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            log.info("%s cannot be loaded and is built again", path)
    _compile(source, compiler, path)
    return ctypes.CDLL(str(path))


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), *COMPILERS)):
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(f"no C++ compiler: install one of {', '.join(COMPILERS)}, or set CXX")


def cache_folder() -> Path:
    """Where compiled libraries are kept: quip/ in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quip"


def _fingerprint(source: Path, compiler: str) -> str:
    version = _run(compiler, "--version")
    parts = (source.read_bytes(), " ".join(FLAGS).encode(), version.encode(), _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    kinds = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)} or lines[:1]))


def _compile(source: Path, compiler: str, path: Path) -> None:
    """Into a name of its own, then renamed: another process sees all of the library or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        _run(compiler, *FLAGS, str(source), "-o", str(built))
        os.replace(built, path)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout
