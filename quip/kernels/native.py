"""C++ compiled at first use and called through ctypes: no build step, no torch headers.

The library is kept in the user's cache under a name that holds a hash of all it depends on:
source and what it includes, flags, compiler and processor.
"""

import ctypes
import errno
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from quip.errors import one_line
from quip.kernels.cache import building, cache_folder, fits, keep, make_ours

COMPILERS = ("g++", "clang++", "c++")  # where CXX is not set
ARM = platform.machine() in ("aarch64", "arm64")
FLAGS = (
    *("-std=c++17", "-O3", "-mcpu=native" if ARM else "-march=native", "-fno-math-errno"),
    *("-ffp-contract=fast", "-shared", "-fPIC"),
)
SECONDS = 120  # that a compilation may take
EXPORTED = re.compile(r'extern "C" [^({;]*?(\w+)\(')
INCLUDED = re.compile(rb'^#include "(.+)"', re.MULTILINE)
log = logging.getLogger(__name__)


class Toolchain:
    """C++ for this machine's processor; a subclass compiles another language for another one."""

    def compiler(self) -> tuple[str, ...]:
        """The words of a command. Raises FileNotFoundError, with the remedy, for want of one."""
        return _compiler()

    def flags(self) -> tuple[str, ...]:
        """What the command is given besides the source and the library's path."""
        return _flags()

    def target(self) -> str:
        """What the library depends on beyond source, flags and the compiler's version."""
        return _processor()


class Rounding(Toolchain):
    """C++ where each operation on floats is rounded: no product is fused with a sum."""

    def flags(self) -> tuple[str, ...]:
        # The last one counts. A pragma would not: g++ knows none, clang++ heeds none at `fast`.
        return *super().flags(), "-ffp-contract=off"


CPP = Toolchain()
ROUNDED = Rounding()


@cache
def library(source: Path, toolchain: Toolchain = CPP) -> ctypes.CDLL | None:
    """The compiled source; None where that fails, and one line in the log says why."""
    try:
        return _load(source, toolchain)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        lines = said.strip().splitlines() if isinstance(said, str) else [str(error)]
        reason = lines[0][:200] if lines else "it did not say why"
        log.warning("%s: torch does its work, more slowly: %s", _short(source), reason)
        return None


def _short(source: Path) -> str:
    """The operation and the file, for a person."""
    return f"{source.parent.name}/{source.name}"


def _load(source: Path, toolchain: Toolchain) -> ctypes.CDLL:
    compiler = toolchain.compiler()
    command = *compiler, *toolchain.flags()
    name = f"{source.parent.name}-{_fingerprint(source, compiler, toolchain)}.so"
    _ignore_relative(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return _kept(source, command, make_ours(cache_folder()) / name)
    except OSError as error:
        _give_up_cache(f"{error.filename}: {error.strerror}" if error.filename else one_line(error))
    with tempfile.TemporaryDirectory(prefix="quip-") as folder:  # once loaded it needs no name
        return _compile(source, command, Path(folder) / name)


def _kept(source: Path, command: tuple[str, ...], path: Path) -> ctypes.CDLL:
    """The library at a path of the cache, compiled unless it is there as it was kept."""
    if fits(path):
        try:
            return _open(path, source)
        except OSError:
            log.info("%s cannot be used and is built again", path)
    with building(path.parent) as folder:
        # Opened before it takes its name: a process keeps to the first library that it has
        # opened by a name.
        compiled = _compile(source, command, folder / path.name)
        keep(folder / path.name, path)
    return compiled


@cache  # one line a process
def _ignore_relative(given: str) -> None:
    if given and not os.path.isabs(given):
        log.warning("XDG_CACHE_HOME=%s is ignored: it is not an absolute path", given[:200])


@cache
def _give_up_cache(reason: str) -> None:
    log.warning(
        "kernels are compiled in each process anew, as they cannot be cached (%s); name a folder "
        "of your own in XDG_CACHE_HOME",
        reason,
    )


def _compiler() -> tuple[str, ...]:
    """The words of a command, such as those of CXX="ccache g++", that begin with a program."""
    for words in (_words("CXX"), *((name,) for name in COMPILERS)):
        if words and (path := shutil.which(words[0])):
            return path, *words[1:]
    raise FileNotFoundError(f"no C++ compiler: install one of {', '.join(COMPILERS)}, or set CXX")


def _flags() -> tuple[str, ...]:
    """FLAGS, and what QUIP_CXXFLAGS adds: sanitizers, for one."""
    return FLAGS + _words("QUIP_CXXFLAGS")


def _words(variable: str) -> tuple[str, ...]:
    """An environment variable as a shell would split it."""
    given = os.environ.get(variable, "")
    try:
        return tuple(shlex.split(given))
    except ValueError as error:
        raise OSError(f"{variable}={given[:200]}: {error}") from error


def _fingerprint(source: Path, compiler: tuple[str, ...], toolchain: Toolchain = CPP) -> str:
    version = _run(*compiler, "--version")
    words = " ".join(toolchain.flags()), version, toolchain.target()
    parts = (*_texts(source), *map(os.fsencode, words))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _texts(source: Path) -> list[bytes]:
    """The source, and what it includes by name, and so on."""
    text = source.read_bytes()
    included = [source.parent / os.fsdecode(name) for name in INCLUDED.findall(text)]
    return [text, *(part for path in included for part in _texts(path))]


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = [platform.processor()]
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    kinds = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)} or lines[:1]))


def _compile(source: Path, command: tuple[str, ...], path: Path) -> ctypes.CDLL:
    """The library at a path that did not exist; the compiler's own files lie beside it."""
    try:
        _run(*command, str(source), "-o", str(path), TMPDIR=str(path.parent))
    except subprocess.CalledProcessError as error:
        for code in (errno.ENOSPC, errno.EDQUOT):  # a fault of the folder, not of the compiler
            if os.strerror(code) in error.stderr:
                raise OSError(code, os.strerror(code), str(path)) from error
        raise
    return _open(path, source)


def _open(path: Path, source: Path) -> ctypes.CDLL:
    """A library with all that its source exports. Raises OSError for any other."""
    found = ctypes.CDLL(str(path))
    for symbol in EXPORTED.findall(source.read_text(encoding="utf-8")):
        if not hasattr(found, symbol):
            raise OSError(f"{path} has no function {symbol}")
    return found


def _run(*command: str, **variables: str) -> str:
    """What a command prints, in English, whatever its bytes."""
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "LC_ALL": "C", **variables},
        check=True,
        timeout=SECONDS,
    )
    return done.stdout
