"""Files that appear whole or not at all, and one writer at a time in a folder."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import stat
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov3.errors import DinoError, did_you_mean

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


# Errors of the disk or the folder, not of the network or of one file.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS})


@contextmanager
def atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`. The file or folder that the block writes there takes the place of `path` at the end.

    It is flushed to the disk before it is renamed, so that a crash leaves the old content or the new; on an exception it
    is removed, and an `OSError` names `path`. A folder only replaces an empty folder. Makes the parent folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the same ending: some writers go by it
    temporary = path.with_name(f".{_owner()}-{secrets.token_hex(4)}.{path.name}")
    try:
        yield temporary
        for written in [temporary, *temporary.rglob("*")]:
            sync(written)
        if temporary.is_dir() and path.is_dir():
            path.rmdir()  # a rename does not replace folders everywhere
        os.replace(temporary, path)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
        if (
            isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary))
        ):  # a library's names no file
            error.filename = str(path)
        raise


def _owner() -> str:
    """This machine and process, as names of temporaries have them."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}-{os.getpid()}"


def remove_leftovers(path: str | os.PathLike[str]) -> list[str]:
    """Removes the temporaries of `path` that killed processes of this machine left beside it; their names."""
    path, removed = Path(path).absolute(), []
    host = _owner().partition("-")[0]
    for other in list(path.parent.iterdir()) if path.parent.is_dir() else ():
        match = re.fullmatch(rf"\.{host}-(\d+)-[0-9a-f]{{8}}\.{re.escape(path.name)}", other.name)
        if match is None or _lives(int(match[1])):
            continue
        if other.is_dir() and not other.is_symlink():
            shutil.rmtree(other)
        else:
            other.unlink()
        removed.append(other.name)
    return sorted(removed)


def _lives(pid: int) -> bool:
    """Whether a process of this machine runs; true where that cannot be known."""
    if fcntl is None:  # Windows, where signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def nonexistent(path: str | os.PathLike[str], known: Iterable[str] = ()) -> str:
    """The message about a path where no file is: which part of it is missing, and the nearest names there or `known`."""
    first = Path(path).expanduser().absolute()
    whole = first
    if first.is_dir():
        return f"{os.fspath(path)} is a folder, not a file"
    while not os.path.lexists(first.parent):
        first = first.parent
    try:
        beside = os.listdir(first.parent)
    except OSError:
        beside = []
    hint = did_you_mean(first.name, [*known, *beside])
    missing = "" if first == whole else f" (there is no {first})"
    return f"no such file or folder: {os.fspath(path)}{missing}{hint}"


def check_free(path: str | os.PathLike[str], overwrite: bool = False, what: str = "") -> None:
    """Raises where a result would replace a file, unless `overwrite`. what: more about the file, for the sentence."""
    if os.path.lexists(path) and not overwrite:
        raise DinoError(f"{os.fspath(path)}{what} exists already: give another name, or --overwrite to replace it")


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Lock:
    """The right to write, held until `release` or the end of the process, however it ends.

    Raises `error`, with `what` in its message, if another process has it. A file system without locks grants it to all. A
    link, or a file that is no lock, in the lock's place is an error: it is neither followed nor written to.
    """

    def __init__(self, path: Path, what: str, error: type[DinoError] = DinoError) -> None:
        self._file: int | None = None
        self._pid = os.getpid()
        if fcntl is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            facts = os.fstat(self._file)
            own = stat.S_ISREG(facts.st_mode) and (not facts.st_size or os.pread(self._file, 8, 0) == b"process ")
        except OSError as cause:
            if os.path.islink(path):
                raise error(f"cannot write to {what}: {path} is a link, not a lock file; delete it") from cause
            raise error(f"cannot write to {what}: {cause.strerror}") from cause
        if not own:
            self.release()
            raise error(f"cannot write to {what}: {path} is no lock file of ours; move it away")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 200).decode(errors="replace").strip() or "another process"
            self.release()
            raise error(f"{holder} is writing to {what}; wait for it, or give another --out") from None
        except OSError:
            os.close(self._file)
            self._file = None
            return
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        # A forked child would share the lock and keep it after this process is dead.
        this = weakref.ref(self)

        def let_go() -> None:
            if lock := this():
                lock.release()

        os.register_at_fork(after_in_child=let_go)

    def release(self) -> None:
        if self._file is not None:
            if os.getpid() == self._pid:
                # A child forked a moment ago may not have closed its copy yet, and closing ours alone would leave it
                # the lock. In the child, unlocking would take the lock from its parent.
                fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
        self._file = None

    __del__ = release
