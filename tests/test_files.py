"""Files and folders take their name when they are complete; until then the old ones stay."""

import errno
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from quip.errors import QuipError, Unavailable, UsageError
from quip.files import check_new, check_regular, new_folder, replacing


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nothing() -> None: ...


def write_file(final: Path, text: str, *, then: Callable[[], object] = nothing) -> None:
    with replacing(final) as partial:
        partial.write_text(text)
        then()


def write_folder(
    final: Path, text: str, *, overwrite: bool = False, then: Callable[[], object] = nothing
) -> None:
    with new_folder(final, overwrite=overwrite) as partial:
        (partial / "file").write_text(text)
        then()


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)
    return folder


@pytest.fixture
def room(tmp_path) -> Path:
    """An empty folder for the files of a test."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


def test_a_file_is_replaced_when_its_block_ends(room):
    final = room / "run.json"
    for text in ("one", "two"):
        with replacing(final) as partial:
            partial.write_text(text)
            assert partial.parent == room  # of the same disk
            assert not final.exists() or final.read_text() == "one"
        assert final.read_text() == text
        assert names(room) == ["run.json"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("midway"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_the_block_leaves_the_old_file_and_no_other(room, error, existing):
    final = room / "run.json"
    if existing:
        final.write_text("old")
    with pytest.raises(type(error)):
        write_file(final, "ne", then=failing(error))
    assert names(room) == (["run.json"] if existing else [])
    assert not existing or final.read_text() == "old"


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "pathlib.Path.write_text"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(room, where, monkeypatch):
    final = room / "run.json"
    final.write_text("old")
    monkeypatch.setattr(where, full_disk)
    with pytest.raises(Unavailable) as caught:
        write_file(final, "new")
    assert str(caught.value) == (
        f"{final} cannot be written (No space left on device); make room, or name another place"
    )
    assert names(room) == ["run.json"]
    assert final.read_text() == "old"


def test_a_file_that_was_never_written_is_said_to_be_missing(room):
    missing = pytest.raises(Unavailable, match=r"run.json cannot be written \(No such file")
    with missing, replacing(room / "run.json"):
        pass
    with pytest.raises(Unavailable, match=r"run.json cannot be written \(No such file"):
        write_file(room / "nowhere" / "run.json", "new")
    assert names(room) == []


@pytest.mark.parametrize("existing", ["nothing", "an empty folder", "files"])
def test_a_folder_appears_when_its_block_ends(room, existing):
    final = room / "above" / "model"
    if existing == "an empty folder":
        final.mkdir(parents=True)
    if existing == "files":
        fill(final)
        (final / "more").mkdir()
    with new_folder(final, overwrite=existing == "files") as partial:
        (partial / "file").write_text("new")
        assert final.exists() == (existing != "nothing")
        assert existing != "files" or names(final) == ["file", "more"]
    assert names(final) == ["file"]
    assert (final / "file").read_text() == "new"
    assert names(final.parent) == ["model"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("midway"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_the_block_leaves_the_old_folder_and_no_other(room, error, overwrite):
    final = fill(room / "model")
    with pytest.raises(type(error)):
        write_folder(final, "ne", overwrite=overwrite, then=failing(error))
    assert names(room) == ["model"]
    assert (final / "file").read_text() == "old"


def test_a_name_that_was_filled_meanwhile_is_kept_and_the_new_folder_goes_beside_it(room):
    final = room / "model"
    for kept in ("model-2", "model-3"):
        with pytest.raises(Unavailable) as caught:
            write_folder(final, kept, then=lambda: final.exists() or fill(final))
        assert str(caught.value) == (
            f"{final} cannot be written (Directory not empty); what was to go there is in "
            f"{room / kept}"
        )
        assert (room / kept / "file").read_text() == kept
    assert (final / "file").read_text() == "old"
    assert names(room) == ["model", "model-2", "model-3"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_took_the_name_meanwhile_is_kept(room, overwrite):
    final = room / "model"
    with pytest.raises(Unavailable, match=r"what was to go there is in .*model-2$"):
        write_folder(final, "new", overwrite=overwrite, then=lambda: final.write_text("a file"))
    assert final.read_text() == "a file"
    assert names(room) == ["model", "model-2"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(room, monkeypatch):
    final, plain = fill(room / "model"), os.replace

    def replace(source: Path, target: Path) -> None:
        if "partial" in source.name and target.name == "model":
            full_disk()
        plain(source, target)

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(Unavailable, match=r"\(No space left on device\); what was to go there is"):
        write_folder(final, "new", overwrite=True)
    assert (final / "file").read_text() == "old"
    assert (room / "model-2" / "file").read_text() == "new"
    assert names(room) == ["model", "model-2"]


def test_a_folder_that_cannot_be_made_is_one_line(room, monkeypatch):
    (room / "file").write_text("")
    with pytest.raises(Unavailable, match=r"model cannot be written \(Not a directory\)"):
        write_folder(room / "file" / "model", "new")
    monkeypatch.setattr("pathlib.Path.mkdir", full_disk)
    with pytest.raises(Unavailable, match=r"model cannot be written \(No space left on device\)"):
        write_folder(room / "model", "new")
    assert names(room) == ["file"]


def test_what_another_process_left_half_done_is_in_nobodys_way(room):
    dead = subprocess.Popen(["true"])
    dead.wait()
    partial = f".model.partial-{platform.node()}-"
    for number in (os.getpid(), dead.pid):
        fill(room / f"{partial}{number}")
    kept = [f"{partial}{os.getppid()}", ".model.partial-another.machine-1", f".m{partial}x"]
    for name in kept:  # a process that runs, on this machine and perhaps on another
        fill(room / name)
    write_folder(room / "model", "new")
    assert names(room) == sorted([*kept, "model"])
    for name in kept:
        shutil.rmtree(room / name)


def test_a_folder_that_was_moved_aside_comes_back_or_goes(room):
    dead = subprocess.Popen(["true"])
    dead.wait()
    old = f".model.old-{platform.node()}-{dead.pid}"
    fill(room / old)  # killed before the new one was in its place
    with pytest.raises(Unavailable, match=r"what was to go there is in .*model-2$"):
        write_folder(room / "model", "new")
    texts = [(room / name / "file").read_text() for name in ("model", "model-2")]
    assert texts == ["old", "new"]
    fill(room / old)  # killed after that
    write_folder(room / "model", "newer", overwrite=True)
    assert (room / "model" / "file").read_text() == "newer"
    assert names(room) == ["model", "model-2"]


@pytest.mark.parametrize("name", [".", "", "../here", "below/.."])
def test_the_folder_may_be_the_current_one(room, name, monkeypatch):
    (room / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(room / "here")
    write_folder(Path(name), "new", overwrite=True)
    assert names(room) == ["here"]
    assert names(room / "here") == ["file"]


def test_a_link_to_a_folder_stays_a_link(room):
    fill(room / "disk" / "model")
    (room / "link").symlink_to(room / "disk" / "model")
    write_folder(room / "link", "new", overwrite=True)
    assert (room / "link").is_symlink()
    assert (room / "disk" / "model" / "file").read_text() == "new"
    assert names(room) == ["disk", "link"]
    assert names(room / "disk") == ["model"]


def test_places_that_can_be_written_to_are_accepted(room):
    for path in (room, room / "new", room / "new" / "below"):
        check_new(path, "--save", overwrite=False)
    check_new(fill(room / "old"), "--save", overwrite=True)
    assert names(room) == ["old"]  # nothing is made yet


def test_places_that_cannot_be_written_to_are_refused_at_once(room, monkeypatch):
    def refusal(path: Path) -> str:
        with pytest.raises(UsageError) as caught:
            check_new(path, "--save", overwrite=False)
        assert isinstance(caught.value, QuipError)
        return str(caught.value)

    old = fill(room / "old")
    assert refusal(old) == (
        f"--save {old}: it exists and is not empty; name another folder or add --overwrite"
    )
    assert refusal(old / "file") == f"--save {old / 'file'}: it is a file; name a folder"
    below = old / "file" / "below"
    assert refusal(below) == f"--save {below}: {old / 'file'} is no folder that can be written to"
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert refusal(room / "new").endswith(f"{room} is no folder that can be written to")


def test_only_files_and_folders_are_opened(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "link", ".", "missing", "loop", "x" * 300):  # the last three by others
        check_regular(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "to_pipe", Path("/dev/zero")):
        with pytest.raises(Unavailable, match="neither a file nor a folder"):
            check_regular(path)
