"""The lock of a folder: one holder at a time, whatever the others do to its file meanwhile."""

import multiprocessing
import os
import runpy
import shutil
from pathlib import Path

import pytest

from quip.errors import Unavailable, UsageError
from quip.jobs.report.folder import RunFolder
from quip.jobs.report.lock import LOCK, FolderLock

SCRIPT = Path(__file__).parents[2] / "scripts" / "dev" / "lock_race.py"


def test_no_race_has_two_holders(tmp_path):
    # Without the comparison of inodes some 30 of 200 have.
    count = runpy.run_path(str(SCRIPT))["count_double_holders"]
    assert count(tmp_path, races=200) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"witness"}


def test_the_script_says_how_many_races_had_two_holders(capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["--races", "8", "--processes", "2"]) == 0
    assert capsys.readouterr().out == "0 of 8 races had two holders\n"


def test_a_lock_that_is_held_is_refused_and_one_that_is_free_again_is_taken(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert first.take()
    assert first.take()  # held already
    assert not second.take()
    assert not second.held
    first.release()
    assert not (tmp_path / LOCK).exists()
    assert second.take()
    first.release()  # nothing of its own
    assert (tmp_path / LOCK).exists()
    assert not first.take()


def test_a_lock_on_a_file_that_lost_its_name_does_not_count(tmp_path, monkeypatch):
    holder, waiting = FolderLock(tmp_path), FolderLock(tmp_path)
    assert holder.take()
    plain, opened = os.open, []

    def open_before_the_holder_lets_go(path, *rest):
        opened.append(plain(path, *rest))
        holder.release()
        return opened[-1]

    monkeypatch.setattr("os.open", open_before_the_holder_lets_go)
    assert waiting.take()
    assert len(opened) == 2  # the file without a name, and the one that a third would find
    assert not FolderLock(tmp_path).take()


def hold(folder: Path) -> None:
    assert FolderLock(folder).take()
    os._exit(0)  # as a kill: nothing is released


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    process.start()
    process.join()
    assert (process.exitcode, (tmp_path / LOCK).exists()) == (0, True)
    assert FolderLock(tmp_path).take()


def test_the_lock_of_a_folder_that_was_deleted_leaves_that_of_the_next_alone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    old, new = FolderLock(folder), FolderLock(folder)
    assert old.take()
    shutil.rmtree(folder)
    folder.mkdir()
    assert new.take()
    old.release()
    assert not old.take()
    assert (folder / LOCK).exists()


def test_a_run_says_that_another_writes_and_nothing_is_made_through_a_link(tmp_path):
    first = RunFolder(tmp_path)
    first.open()
    with pytest.raises(UsageError, match=r"another run is writing to it; name another folder"):
        RunFolder(tmp_path)
    first.release()
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="cannot be written"):
        RunFolder(tmp_path, overwrite=True).open()
    assert not (tmp_path / "elsewhere").exists()
