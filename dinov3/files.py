"""Files that appear whole or not at all, and one writer at a time in a folder."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov3.errors import DinoError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` to write to. When the block ends it is flushed to disk and renamed into place, so that
    a crash leaves the old file or the new one; on an exception it is removed. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # the same ending: some writers go by it
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Lock:
    """The right to write, held until `release` or the end of the process, however it ends.

    Raises `error` if somebody else has it, in words about `what`. Where the file system knows no locks, everybody has it.
    """

    def __init__(self, path: Path, what: str, error: type[DinoError] = DinoError) -> None:
        self._file: int | None = None
        self._pid = os.getpid()
        if fcntl is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as cause:
            raise error(f"cannot write to {what}: {cause.strerror}") from cause
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
