"""Tar shards, plain and compressed: headers are walked once, members are read at their offset."""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dinov3.data.images import HEAD, check_size, image_suffix, is_image_header, most_bytes, os_reason
from dinov3.data.sources.items import COMPANIONS, FORWARD, Names, Part, Place, Unreadable, first_bytes, storable
from dinov3.data.sources.remote import is_remote, opened, read_range, size_of
from dinov3.errors import ImageError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MOST_HEADER = 1 << 20  # bytes of a long name or of the extended attributes of a member


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes inside a plain tar."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        if is_remote(self.path):
            return self._whole(read_range(self.path, self.offset, self.size))
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                data = os.pread(file, self.size, self.offset)
                while len(data) < self.size and (
                    more := os.pread(file, self.size - len(data), self.offset + len(data))
                ):
                    data += more  # one call reads 2 GB at most
            finally:
                os.close(file)
        except OSError as error:
            raise ImageError(os_reason(error, self.path)) from None
        return self._whole(data)

    def _whole(self, data: bytes) -> bytes:
        if len(data) < self.size:
            raise ImageError(f"truncated tar: {os.path.basename(self.path)} ends inside of this member")
        return data


PACKED_BLOCK = 1 << 20  # bytes of what a .tar.gz decompresses to


def _unpacked(path: str) -> Iterator[tuple[bytes, int]]:
    """Blocks of what a .tar.gz decompresses to, the last one shorter; what comes before damage is in the last."""
    with opened(path) as file, gzip.GzipFile(fileobj=file) as stream:
        while True:
            block = bytearray()
            try:
                while len(block) < PACKED_BLOCK and (more := stream.read1(PACKED_BLOCK - len(block))):
                    block += more
            except (OSError, EOFError, zlib.error):
                yield bytes(block), len(block)
                raise
            yield bytes(block), len(block)
            if len(block) < PACKED_BLOCK:
                return


@dataclass(frozen=True, slots=True)
class _PackedSpan:
    """Bytes inside what a .tar.gz decompresses to."""

    path: str
    offset: int
    size: int
    stamp: str

    def read(self) -> bytes:
        data, number, start = b"", self.offset // PACKED_BLOCK, self.offset % PACKED_BLOCK
        try:
            while len(data) < self.size:
                block = FORWARD.block((self.path, self.stamp), number, lambda: _unpacked(self.path))
                data += block[start : start + self.size - len(data)]
                number, start = number + 1, 0
        except StopIteration:
            pass
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise ImageError(os_reason(error, self.path)) from None
            raise ImageError(f"truncated or damaged tar.gz: {error}") from None
        if len(data) < self.size:
            raise ImageError(f"truncated tar: {os.path.basename(self.path)} ends inside of this member")
        return data


class _EndAware(tarfile.TarInfo):
    """A member that notes whether the tar ended with its end mark; `tarfile` is silent where it does not."""

    HEADERS = (
        tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
    )  # fmt: skip

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _EndAware:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True  # type: ignore[attr-defined]
            raise

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in self.HEADERS and self.size > MOST_HEADER:  # `tarfile` would read it as a whole
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


@dataclass
class Tar(Part):
    """The images of one shard: the headers are walked once, for names and offsets."""

    path: str
    name: str
    stamp: str
    packed: bool
    members: Names = field(default_factory=Names)
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    skipped: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    kind: str = "tar"

    @classmethod
    def open(cls, path: Path | str, name: str, stamp: str) -> Tar:
        packed = first_bytes(path, 2) == b"\x1f\x8b"
        tar = cls(str(path), name, stamp, packed)
        try:
            with (
                opened(path) as file,
                gzip.GzipFile(fileobj=file) if packed else file as stream,
                tarfile.open(fileobj=stream, mode="r:", tarinfo=_EndAware) as archive,
            ):
                tar._index(archive, None if packed else size_of(path))
        except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, OverflowError, RecursionError) as error:
            tar._cut(str(error) or type(error).__name__)
        return tar

    def _index(self, archive: tarfile.TarFile, length: int | None) -> None:
        seen: dict[str, int] = {}
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would hold them all
            base = PurePosixPath(member.name).name
            if self.packed and member.size > most_bytes():  # what follows would be found by decompressing all of it
                self._cut(f"{base} has {member.size >> 20:,} MB; unpack the archive", storable(member.name))
                return
            if member.isdir() or base.startswith("."):
                continue
            is_image = image_suffix(base)
            if not is_image and member.isreg() and PurePosixPath(base).suffix.lower() not in COMPANIONS:
                stream: Any = archive.fileobj
                stream.seek(member.offset_data)
                is_image = is_image_header(stream.read(min(HEAD, member.size)))
            if not is_image:
                self.skipped += 1
                continue
            name = storable(member.name.removeprefix("./"))
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                name += f"~{seen[name]}"  # a tar may hold a name twice
            try:
                check_size(member.size)
            except ImageError as error:
                self.broken.append((name, str(error)))
                continue
            if not member.isreg() or member.issparse():
                self.broken.append((name, "a link or a sparse file inside a tar; only plain members are read"))
            elif length is not None and member.offset_data + member.size > length:
                self._cut("ends inside of this member", name)
                return
            else:
                self.members.append(name)
                self.offsets.append(member.offset_data)
                self.sizes.append(member.size)
        if not getattr(archive, "ended", False):
            self._cut("there is no end mark; members may be missing")

    def _cut(self, reason: str, name: str = "end") -> None:
        """Notes that the shard is not whole. Of a compressed one, the last member may be a half: that is tried."""
        if self.packed and self.members:
            try:
                self.place_of(len(self.members) - 1).read()
            except ImageError:
                name = self.members.pop()
                self.offsets.pop()
                self.sizes.pop()
        self.broken.append((name, f"truncated or damaged tar, after {len(self.members)} images: {reason}"))

    def __len__(self) -> int:
        return len(self.members) + len(self.broken)

    def forward_runs(self) -> list[tuple[int, int]]:
        return [(len(self), sum(self.sizes))] if self.packed else []

    def path_of(self, i: int) -> str:
        n = len(self.members)
        return f"{self.name}#{self.members[i] if i < n else self.broken[i - n][0]}"

    def stamp_of(self, i: int) -> str:
        return f"{self.stamp}@{self.offsets[i]}" if i < len(self.members) else self.stamp

    def place_of(self, i: int) -> Place:
        n = len(self.members)
        if i >= n:
            return Unreadable(self.broken[i - n][1])
        if self.packed:
            return _PackedSpan(self.path, self.offsets[i], self.sizes[i], self.stamp)
        return _Span(self.path, self.offsets[i], self.sizes[i])


def is_tar(path: Path, head: bytes) -> bool:
    if head[:2] == b"\x1f\x8b":
        return True
    if head[:3] == b"BZh" or head[:6] == b"\xfd7zXZ\0":
        raise ImageError("compressed with bzip2 or xz: only plain and gzip tars are read")
    try:
        return tarfile.is_tarfile(path)  # those of before 1988 have no signature
    except OSError:
        return False
