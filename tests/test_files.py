"""Atomic writing. Locks are tested where they are used: stores and runs."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch

from dinov3 import files
from dinov3.errors import DinoError
from dinov3.files import Lock, atomically, check_free
from dinov3.weights.writing import write_safetensors


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_takes_the_old_ones_place_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    with atomically(path) as new:
        new.write_text("one")
        assert not path.exists()
    with atomically(path) as new:
        new.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert names(path.parent) == ["a.txt"]


def test_after_an_error_the_old_file_is_untouched(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomically(path) as new:
        new.write_text(f"half {1 // 0}")
    with pytest.raises(TypeError), atomically(path) as new, new.open("w") as file:
        file.write(b"not text")

    def full(_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="no space") as raised, atomically(path) as new:
        new.write_text("half")
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_temporaries_of_killed_processes_are_removed_and_no_others(tmp_path):
    code = (
        "import os, sys; from dinov3.files import atomically\n"
        "with atomically(sys.argv[1]) as new:\n"
        "    new.mkdir(); (new / 'half').write_text('x'); os.kill(os.getpid(), 9)"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False).returncode == -9
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "another")], check=False)
    left = names(tmp_path)
    assert len(left) == 3
    with atomically(tmp_path / "out") as new:  # this process lives
        new.mkdir()
        assert files.remove_leftovers(tmp_path / "out") == [n for n in left if n.endswith(".out")]
        assert new.is_dir()
    assert names(tmp_path) == sorted([*(n for n in left if n.endswith(".another")), "out"])
    assert files.remove_leftovers(tmp_path / "nowhere" / "out") == []


def test_a_folder_takes_the_place_of_nothing_or_of_an_empty_folder_only(tmp_path):
    for _ in range(2):
        with atomically(tmp_path / "out") as new:
            new.mkdir()
            (new / "a").write_text("1")
        assert names(tmp_path / "out") == ["a"]
        (tmp_path / "out" / "a").unlink()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(OSError), atomically(tmp_path / "out") as new:
        new.mkdir()
    assert names(tmp_path / "out") == ["mine"]
    assert names(tmp_path) == ["out"]


def test_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    with atomically(tmp_path / "a") as first, atomically(tmp_path / "a") as second:
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"
    assert names(tmp_path) == ["a"]


def test_permissions_are_the_usual_ones(tmp_path):
    (tmp_path / "usual").touch()
    with atomically(tmp_path / "text") as new:
        new.touch()
    write_safetensors({"x": torch.zeros(2)}, tmp_path / "tensors")
    assert {p.stat().st_mode for p in tmp_path.iterdir()} == {(tmp_path / "usual").stat().st_mode}


@pytest.mark.skipif(files.fcntl is None, reason="no locks on this system")
@pytest.mark.parametrize("link", ["symlink", "hard link", "copy"])
def test_a_lock_neither_follows_a_link_nor_writes_over_another_file(tmp_path, link):
    precious, lock = tmp_path / "precious", tmp_path / ".writer.lock"
    precious.write_text("years of work")
    if link == "symlink":
        lock.symlink_to(precious)
    elif link == "hard link":
        lock.hardlink_to(precious)
    else:
        lock.write_text("years of work")
    with pytest.raises(DinoError, match=r"cannot write to the store: .*\.writer\.lock is (a link|no lock file)"):
        Lock(lock, "the store")
    assert precious.read_text() == lock.read_text() == "years of work"
    lock.unlink()
    for _ in range(2):  # the lock of a process that is gone is taken over
        held = Lock(lock, "the store")
        assert lock.read_text().startswith("process ")
        held.release()


def test_a_result_replaces_no_file_without_overwrite(tmp_path):
    check_free(tmp_path / "new")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DinoError, match="dangling exists already"):
        check_free(tmp_path / "dangling")
    check_free(tmp_path / "dangling", overwrite=True)
