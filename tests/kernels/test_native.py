"""Compiled libraries: what is kept is ours and whole, and what is not so is never loaded."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from quip.kernels import cache, native
from quip.kernels.panel import cpu

KERNELS = Path(native.__file__).parent

needs_compiler = pytest.mark.skipif(not cpu.ROUND.available(), reason="no C++ compiler")
pytestmark = needs_compiler


def forget() -> None:
    """As in a new process."""
    for remembered in (native.library, native._ignore_relative, native._give_up_cache):
        remembered.cache_clear()


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No library compiled or loaded yet, and a room for temporary folders that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    forget()
    yield
    assert list((tmp_path / "temporary").iterdir()) == []
    forget()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of the libraries; not there yet."""
    return tmp_path / "cache" / "quip"


def write(path: Path, value: int = 2, name: str = "two") -> Path:
    """C++ whose only function returns a number."""
    path.write_text(f'extern "C" int {name}() {{ return {value}; }}\n')
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path / "two.cpp")


def place(source: Path, folder: Path) -> Path:
    """Where the library of a source is kept."""
    fingerprint = native._fingerprint(source, native._compiler())
    return folder / f"{source.parent.name}-{fingerprint}.so"


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def compile_into(path: Path, source: Path) -> Path:
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    return path


# What is kept


def test_a_library_is_compiled_once_and_kept_with_its_digest_for_us_alone(source, folder):
    assert native.library(source).two() == 2
    path = place(source, folder)
    assert names(folder) == [path.name, f"{path.name}.sha256"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Path(f"{path}.sha256").read_text() == f"{digest}  {path.name}\n"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    age = path.stat().st_mtime_ns
    forget()
    assert native.library(source).two() == 2
    assert path.stat().st_mtime_ns == age


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_tail(path: Path) -> None:
    half = path.stat().st_size // 2
    path.write_bytes(path.read_bytes()[:half] + bytes(half))


def flip_a_bit(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def exchange(path: Path) -> None:
    other = write(path.parent.parent / "three.cpp", 3)
    compile_into(path, other)


def keep_without_the_function(path: Path) -> None:
    """Whole, and with the right digest."""
    other = write(path.parent.parent / "other.cpp", 3, "other")
    cache.keep(compile_into(path.parent / "other.so", other), path)


def lose_digest(path: Path) -> None:
    Path(f"{path}.sha256").unlink()


def spoil_digest(path: Path) -> None:
    Path(f"{path}.sha256").write_bytes(b"\xff\xfe\0")


DAMAGES = (
    *(cut, zero_tail, flip_a_bit, exchange, keep_without_the_function),
    *(lose_digest, spoil_digest),
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_library_that_does_not_fit_is_compiled_again(source, folder, tmp_path, damage):
    # Compiled by this process and not loaded: a library once loaded stays what it was.
    path = place(source, cache.make_ours(folder))
    cache.keep(compile_into(tmp_path / "two.so", source), path)
    damage(path)
    assert native.library(source).two() == 2
    assert cache.fits(path)
    copy = shutil.copy(path, tmp_path / "copy.so")  # whose name this process has never opened
    assert native._open(Path(copy), source).two() == 2
    assert names(folder) == [path.name, f"{path.name}.sha256"]


def test_a_library_that_cannot_be_replaced_is_compiled_for_this_process(source, folder, caplog):
    path = place(source, cache.make_ours(folder))
    path.mkdir()
    assert native.library(source).two() == 2
    (line,) = caplog.messages
    assert "Is a directory" in line
    assert "XDG_CACHE_HOME" in line


def test_all_functions_of_the_kernels_are_asked_for():
    sources = sorted(KERNELS.rglob("*.cpp"))
    found = {path: native.EXPORTED.findall(path.read_text()) for path in sources}
    assert found[KERNELS / "hadamard" / "cpu.cpp"] == ["rotate_float", "rotate_double"]
    for path in sources:
        assert len(found[path]) == path.read_text().count('extern "C"') > 0


# Where it is kept


def plant(source: Path, folder: Path) -> None:
    """A library of another's, with a digest that fits."""
    folder.mkdir(parents=True, exist_ok=True)
    other = write(folder.parent / "three.cpp", 3)
    cache.keep(compile_into(folder / "three.so", other), place(source, folder))


def open_to_all(folder: Path) -> None:
    folder.chmod(0o777)


def open_to_the_group(folder: Path) -> None:
    folder.chmod(0o770)


def put_a_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def give_away(folder: Path) -> None:
    os.chown(folder, 12345, -1)


REFUSED = {
    open_to_all: "others can write to it",
    open_to_the_group: "others can write to it",
    put_a_link: "it is a link",
    give_away: "it belongs to another user",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_a_folder_that_others_can_have_written_to_is_not_used(source, folder, spoil, caplog):
    if spoil is give_away and os.geteuid() != 0:
        pytest.skip("root alone gives files away")
    plant(source, folder)
    spoil(folder)
    there = names(folder)
    assert native.library(source).two() == 2  # and not 3
    more = write(source.with_name("more.cpp"), 4, "four")
    assert native.library(more).four() == 4
    (line,) = caplog.messages  # one for both
    assert f"({folder}: {REFUSED[spoil]}" in line
    assert line.endswith("name a folder of your own in XDG_CACHE_HOME")
    assert names(folder) == there


def test_a_folder_that_others_could_read_is_closed(source, folder, caplog):
    folder.mkdir(parents=True, mode=0o755)
    folder.chmod(0o755)
    assert native.library(source).two() == 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert caplog.messages == []


def test_a_relative_cache_is_ignored_and_the_log_says_so_once(
    source, tmp_path, monkeypatch, caplog
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", ".cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    plant(source, here / ".cache" / "quip")
    assert native.library(source).two() == 2  # and not 3
    native.library(write(source.with_name("more.cpp"), 4, "four"))
    assert caplog.messages == ["XDG_CACHE_HOME=.cache is ignored: it is not an absolute path"]
    assert len(names(tmp_path / "home" / ".cache" / "quip")) == 4


@pytest.mark.parametrize("where", ["below a file", "nowhere", "on a full disk"])
def test_without_a_cache_each_process_compiles_for_itself(
    source, tmp_path, monkeypatch, caplog, where
):
    (tmp_path / "file").write_text("")
    if where == "below a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif where == "nowhere":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "relative")
    else:
        full = f"case $* in */cache/quip/*) echo as: {os.strerror(errno.ENOSPC)} >&2; exit 1;; esac"
        monkeypatch.setenv("CXX", str(script(tmp_path / "full", f'{full}\nexec g++ "$@"')))
    assert native.library(source).two() == 2
    (line,) = caplog.messages
    assert line.startswith("kernels are compiled in each process anew, as they cannot be cached (")
    assert "XDG_CACHE_HOME" in line
    forget()
    assert native.library(source).two() == 2


# Compilers


def test_a_compile_that_fails_is_logged_once_with_its_reason(folder, tmp_path, caplog):
    broken = tmp_path / "broken.cpp"
    broken.write_text("#error this cannot be built\n")
    assert native.library(broken) is None
    assert native.library(broken) is None
    (line,) = caplog.messages
    assert "broken.cpp" in line
    assert "this cannot be built" in line
    assert names(folder) == []  # no half-built library stays behind


def test_a_compiler_may_be_several_words(source, tmp_path, monkeypatch):
    wrapper = script(tmp_path / "wrapper", f'echo "$@" >> {tmp_path / "calls"}\nexec "$@"')
    monkeypatch.setenv("CXX", f"'{wrapper}' g++ -Wall")
    assert native.library(source).two() == 2
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[:3] for call in calls] == [
        ["g++", "-Wall", "--version"],
        ["g++", "-Wall", native.FLAGS[0]],
    ]


def test_words_that_do_not_end_are_a_line_in_the_log(source, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "'g++")
    assert native.library(source) is None
    (line,) = caplog.messages
    assert line.endswith("CXX='g++: No closing quotation")


@pytest.mark.parametrize("fails", [False, True])
def test_a_compiler_may_print_any_bytes(source, tmp_path, monkeypatch, caplog, fails):
    end = "exit 1" if fails else 'exec g++ "$@"'
    says = "printf 'caf\\351\\n'; printf 'caf\\351 is no text\\n' >&2"
    version = "case $* in *--version) exit 0;; esac"
    monkeypatch.setenv("CXX", str(script(tmp_path / "odd", f"{says}\n{version}\n{end}")))
    library = native.library(source)
    assert library is None if fails else library.two() == 2
    assert [line.split(": ")[-1] for line in caplog.messages] == ["caf\ufffd is no text"] * fails


def test_a_header_that_changes_makes_another_library(source, folder):
    source.write_text('#include "one.h"\nextern "C" int two() { return VALUE; }\n')
    source.with_name("one.h").write_text('#include "other.h"\n')
    for value in (2, 3):
        source.with_name("other.h").write_text(f"#define VALUE {value}\n")
        forget()
        assert native.library(source).two() == value


def test_more_flags_make_another_library(source, folder, monkeypatch):
    native.library(source)
    monkeypatch.setenv("QUIP_CXXFLAGS", "-O0 '-DNAME=a b'")
    forget()
    assert native.library(source).two() == 2
    assert len(names(folder)) == 4


# Several processes


def build(source: Path, results) -> None:
    library = native.library(source)
    results.put(library is not None and library.two())


def test_processes_that_compile_at_once_do_not_disturb_each_other(source, folder, caplog):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=build, args=(source, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [2, 2, 2]
    for process in processes:
        process.join()
    assert len(names(folder)) == 2
    assert cache.fits(place(source, folder))


def test_what_a_killed_compilation_left_goes_and_what_goes_on_stays(
    source, folder, tmp_path, monkeypatch
):
    slow = script(
        tmp_path / "slow",
        f'case $* in *--version) exit 0;; esac\necho > "$TMPDIR/cc.s"\ntouch {tmp_path}/began\n'
        "exec sleep 60",
    )
    code = (
        "import pathlib, sys; from quip.kernels import native\n"
        "native.library(pathlib.Path(sys.argv[1]))"
    )
    line = [sys.executable, "-c", code, str(source)]

    def begin() -> subprocess.Popen:
        process = subprocess.Popen(
            line, env={**os.environ, "CXX": str(slow)}, start_new_session=True
        )
        while not (tmp_path / "began").exists():
            assert process.poll() is None
            time.sleep(0.01)
        (tmp_path / "began").unlink()
        return process

    killed = begin()
    (left,) = names(folder)
    assert names(folder / left) == ["cc.s"]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    other = begin()  # which sweeps
    try:
        (running,) = names(folder)
        assert running != left
        monkeypatch.setattr(cache, "STARTED", time.time() + 1)
        assert native.library(source).two() == 2
        assert running in names(folder)
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.wait()
    native.library(write(source.with_name("more.cpp"), 4, "four"))
    assert running not in names(folder)
    assert len(names(folder)) == 4


def test_folders_of_older_versions_go_in_an_hour(source, folder):
    cache.make_ours(folder)
    for name, age in (("tmpold", 2 * cache.HOUR), ("tmpnew", 60)):
        (folder / name).mkdir()
        (folder / name / "half.so").write_bytes(b"")
        os.utime(folder / name, (cache.STARTED - age,) * 2)
    native.library(source)
    assert [name for name in names(folder) if name.startswith("tmp")] == ["tmpnew"]
