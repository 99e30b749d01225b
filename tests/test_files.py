"""Files and folders take their name when they are complete; until then the old ones stay."""

import contextlib
import errno
import os
import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quip.errors import QuipError, Unavailable, UsageError
from quip.files import check_new, make_folder, new_folder, replacing


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


# What a power cut and a umask leave


@pytest.fixture
def happened(room, monkeypatch) -> list[tuple[str, ...]]:
    """What is synced, renamed and removed, in order, by paths below the room."""
    events: list[tuple[str, ...]] = []
    replace, fsync, remove = os.replace, os.fsync, shutil.rmtree

    def name(path: Path | str) -> str:
        below = str(Path(path).relative_to(room))
        return re.sub(rf"-{re.escape(platform.node())}-\d+", "", below)

    def watched_replace(source: Path, target: Path) -> None:
        events.append(("rename", name(source), name(target)))
        replace(source, target)

    def watched_fsync(file: int) -> None:
        events.append(("sync", name(os.readlink(f"/proc/self/fd/{file}"))))
        fsync(file)

    def watched_remove(path: Path, **options: bool) -> None:
        if path.exists():
            events.append(("remove", name(path)))
        remove(path, **options)

    monkeypatch.setattr("shutil.rmtree", watched_remove)
    monkeypatch.setattr("os.replace", watched_replace)
    monkeypatch.setattr("os.fsync", watched_fsync)
    return events


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc/self/fd")


@needs_proc
def test_a_file_is_on_the_disk_before_its_name_is_and_then_its_name(room, happened):
    write_file(room / "run.json", "text")
    partial = ".run.json.partial"
    assert happened == [("sync", partial), ("rename", partial, "run.json"), ("sync", ".")]


@needs_proc
def test_a_folder_is_on_the_disk_whole_before_the_old_one_goes(room, happened):
    final = fill(room / "model")
    with new_folder(final, overwrite=True) as partial:
        (partial / "below").mkdir()
        for file in (partial / "file", partial / "below" / "file"):
            file.write_text("new")
    new, old = ".model.partial", ".model.old"
    assert happened == [
        ("sync", "."),  # the name of the new folder
        *[("sync", f"{new}/below/file"), ("sync", f"{new}/below")],
        *[("sync", f"{new}/file"), ("sync", new)],
        *[("rename", "model", old), ("rename", new, "model"), ("sync", "."), ("remove", old)],
    ]


@needs_proc
def test_folders_that_are_made_have_names_on_the_disk(room, happened):
    make_folder(room / "a" / "b")
    assert sorted(happened) == [("sync", "."), ("sync", "a")]
    make_folder(room / "a" / "b")
    assert len(happened) == 2


@pytest.mark.parametrize(("code", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_syncs_no_folders_will_do(room, code, passes, monkeypatch):
    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", fsync)
    with contextlib.nullcontext() if passes else pytest.raises(Unavailable, match="Input/output"):
        write_file(room / "run.json", "text")
    with contextlib.nullcontext() if passes else pytest.raises(Unavailable, match="Input/output"):
        write_folder(room / "model", "text")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_all_that_is_written_has_the_mode_of_the_umask(room, umask):
    def write(path: Path) -> None:
        save_file({"x": torch.zeros(2)}, path)
        path.chmod(0o600)  # as some versions of safetensors leave it

    before = os.umask(umask)
    try:
        with replacing(room / "block.safetensors") as partial:
            write(partial)
        with new_folder(room / "model", overwrite=False) as partial:
            write(partial / "model.safetensors")
            (partial / "below").mkdir()
            write(partial / "below" / "model.safetensors")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in room.rglob("*.safetensors")}
    assert modes == {0o666 & ~umask}
    assert {stat.S_IMODE(p.stat().st_mode) for p in room.rglob("*") if p.is_dir()} == {
        0o777 & ~umask
    }


def test_nothing_is_written_through_a_link_that_waits_at_the_partial_name(room):
    (room / "mine").write_text("mine")
    (room / ".run.json.partial").symlink_to(room / "mine")
    write_file(room / "run.json", "text")
    assert [(room / name).read_text() for name in names(room)] == ["mine", "text"]
