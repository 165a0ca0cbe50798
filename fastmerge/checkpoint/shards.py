"""The output's weight files while they grow: created, reserved, written, checked and made durable."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from fastmerge.checkpoint import io as _io
from fastmerge.checkpoint import system
from fastmerge.checkpoint.seal import blocks
from fastmerge.errors import CheckpointError, NoSpace, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from fastmerge.checkpoint.io import I64, Io
    from fastmerge.checkpoint.journal import Range
    from fastmerge.checkpoint.layout import Layout
    from fastmerge.checkpoint.seal import Mark

COPY_PIECE = 64 << 20
"""Bytes of one copy and of its checksum; after each, writeback starts."""

DIRECT_BYTES = 64 << 10
"""Shortest stretch that is written past the page cache.

A new page of the cache costs its allocation and a copy: system time that can be longer than the disk's own, above all
on virtual machines.
"""

_BUFFER = 2 << 20
"""Bytes of each thread's buffer for copies: of a hundred threads' they are still a small part of the process."""

_PART = ".part"


class ShardFiles:
    """Open files of all shards, under names that no reader takes for a model's.

    Args:
        data: the directory that becomes the output.
        layout: the shards.
        io: the primitive.
        features: where missing system features are noted.
        own: numbers of the shards that are written here; no others are opened.

    Attributes:
        fds: one per shard, -1 for those that are not open.
    """

    def __init__(self, data: Path, layout: Layout, io: Io, features: dict[str, bool], own: Iterable[int]) -> None:
        self.fds: list[int] = []
        self._direct: list[int] = []
        self._data = data
        self._layout = layout
        self._own = [(i, layout.shards[i]) for i in sorted(own)]
        self._io = io
        self._features = features
        self._names: dict[int, str] = {}
        self._bounds = [(s.data_start, s.size) for s in layout.shards]
        self._local = threading.local()

    def open(self) -> None:
        """Creates the files, or takes those of an interrupted run; reserves them and writes the headers.

        Raises:
            OutputError: the disk is too small, with the bytes needed and free; more files than a process may open.
        """
        count = len(self._own)
        spare = system.spare_descriptors(count)
        if spare < count:
            raise OutputError(
                f"{self._data}: {count} output files are written at once, and this process may open {spare} more "
                f"(ulimit -n): raise the limit or the shard size"
            )
        self.fds += [-1] * len(self._layout.shards)
        for i, shard in self._own:
            fd = self.fds[i] = self._open(shard.name)
            self._names[fd] = str(self._data / shard.name)
        self._open_direct()
        self._reserve()
        for i, shard in self._own:
            self._write_bytes(self.fds[i], shard.header)

    def check(self, table: I64) -> list[list[int]]:
        """The rows (shard, offset, x, nbytes) as integers.

        Raises:
            ValueError: a row lies outside its shard's data.
        """
        rows: list[list[int]] = table.tolist()
        for shard, offset, _, nbytes in rows:
            low, high = self._bounds[shard] if 0 <= shard < len(self._bounds) else (0, -1)
            if nbytes < 0 or offset < low or offset + nbytes > high:
                raise ValueError(f"shard {shard}: bytes {offset} to {offset + nbytes} are outside its data")
        return rows

    def write(self, rows: list[list[int]]) -> list[Range]:
        """Writes checked rows (shard, offset, address, nbytes); their checksums, one per stretch of a file."""
        self._put(rows)
        # While the bytes are still in the cache.
        ranges: list[Range] = []
        rows = sorted(r for r in rows if r[3])
        at = 0
        while at < len(rows):
            shard, start, address, nbytes = rows[at]
            digest = xxhash.xxh3_64(system.view(address, nbytes))
            stop = start + nbytes
            at += 1
            while at < len(rows) and rows[at][:2] == [shard, stop]:
                digest.update(system.view(rows[at][2], rows[at][3]))
                stop += rows[at][3]
                at += 1
            ranges.append((shard, start, stop - start, digest.intdigest()))
            system.start_writeback(self.fds[shard], start, stop - start)
        return ranges

    def _put(self, rows: list[list[int]]) -> None:
        if self._direct:
            self._write_split(rows)
        else:
            self._write_rows(rows)

    def _write_rows(self, rows: list[list[int]]) -> None:
        _io.write(self._io, np.array([[self.fds[r[0]], *r[1:]] for r in rows], np.int64), self.name)

    def _write_split(self, rows: list[list[int]]) -> None:
        """Writes whole blocks past the page cache, where memory and file agree on their place in a block.

        The first and last bytes of a stretch share blocks with its neighbours, perhaps in another thread's hands,
        so they go through the cache, whose pages take both.
        """
        block = system.PAGE
        plain: list[list[int]] = []
        for shard, offset, address, nbytes in rows:
            head = -offset % block
            body = (nbytes - head) // block * block
            if body < DIRECT_BYTES or (offset - address) % block:
                plain.append([shard, offset, address, nbytes])
                continue
            table = np.array([[self._direct[shard], offset + head, address + head, body]], np.int64)
            if not _io.write_direct(self._io, table, self.name):
                self._features["direct"] = False
                plain.append([shard, offset, address, nbytes])
                continue
            tail = head + body
            ends = [shard, offset, address, head], [shard, offset + tail, address + tail, nbytes - tail]
            plain += [row for row in ends if row[3]]
        if plain:
            self._write_rows(plain)

    def copy(self, fd: int, source: int, shard: int, to: int, nbytes: int) -> Range:
        """Copies bytes of an input file, and takes their checksum.

        Past the page cache where that is fast: reading, hashing and writing so takes less of a core than a copy in
        the kernel alone, which fills new pages. Elsewhere the kernel copies, perhaps by a clone or on the server,
        as far as it can; the input is then read for its checksum only.
        """
        done = 0
        if not self._direct:
            rest = _io.copy(self._io, np.array([[fd, source, self.fds[shard], to, nbytes]], np.int64), self.name)
            done = nbytes - int(rest[:, 4].sum())
            if done < nbytes:
                self._features["copy_file_range"] = False
        digest = xxhash.xxh3_64()
        buffer = self._buffer()
        address = buffer.ctypes.data
        address += (to - address) % system.PAGE  # memory and file agree on their place in a block
        for at in range(0, nbytes, _BUFFER):
            size = min(_BUFFER, nbytes - at)
            _io.read(self._io, np.array([[fd, source + at, address, size]], np.int64), self.name)
            digest.update(system.view(address, size))
            left = at + size - max(at, done)
            if left > 0:
                skip = size - left
                self._put([[shard, to + at + skip, address + skip, left]])
        system.start_writeback(self.fds[shard], to, nbytes)
        return shard, to, nbytes, digest.intdigest()

    def matches(self, record: Range) -> bool:
        """Whether the bytes on disk still have a journalled checksum."""
        shard, offset, nbytes, expected = record
        if shard >= len(self.fds) or self.fds[shard] < 0:
            return False
        low, high = self._bounds[shard]
        if offset < low or offset + nbytes > high:
            return False
        digest = xxhash.xxh3_64()
        buffer = self._buffer()
        for at in range(offset, offset + nbytes, _BUFFER):
            size = min(_BUFFER, offset + nbytes - at)
            table = np.array([[self.fds[shard], at, buffer.ctypes.data, size]], np.int64)
            try:
                _io.read(self._io, table, self.name)
            except CheckpointError:
                return False
            digest.update(system.view(buffer.ctypes.data, size))
        return digest.intdigest() == expected

    def sync(self, shard: int) -> None:
        """Makes the data of one shard durable; an OSError means that some of it is lost."""
        os.fdatasync(self.fds[shard])

    def write_file(self, name: str, data: bytes | Path, expected: Mark) -> None:
        """Writes a file beside the shards, durably, with the permissions that the umask leaves.

        Raises:
            OutputError: the file that was to be copied is not what it was.
        """
        path = self._data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, at = xxhash.xxh3_64(), 0
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        self._names[fd] = str(path)
        try:
            for block in [data] if isinstance(data, bytes) else blocks(data):
                self._write_bytes(fd, block, at)
                digest.update(block)
                at += len(block)
            os.fsync(fd)
            for directory in path.parents[: name.count("/")]:
                system.sync_directory(directory)
        finally:
            del self._names[fd]
            os.close(fd)
        if (at, digest.hexdigest()) != expected:
            raise OutputError(f"{data!s}: changed while the merge ran: --resume takes it as it is then")

    def expected(self) -> set[str]:
        """Names that belong in the directory before :meth:`write_file`."""
        return {s.name + part for s in self._layout.shards for part in ("", _PART)}

    def rename(self) -> None:
        """Gives every shard its final name."""
        for shard in self._layout.shards:
            part = self._data / (shard.name + _PART)
            if part.exists():
                part.rename(self._data / shard.name)

    def name(self, fd: int) -> str:
        """The path behind a descriptor, for messages; input files included."""
        name = self._names.get(fd)
        if name is None:
            with contextlib.suppress(OSError):
                name = str(Path(f"/proc/self/fd/{fd}").readlink())
        return name or f"fd {fd}"

    def close(self) -> None:
        """Closes the files."""
        _close(self.fds)
        _close(self._direct)

    def _open(self, name: str) -> int:
        """A shard in progress; one that a commit had renamed already gets its working name back."""
        part, final = self._data / (name + _PART), self._data / name
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        if final.is_file() and not os.path.lexists(part):
            final.rename(part)
        if os.path.lexists(part):
            info = part.lstat()
            if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
                # What else has a name for these bytes must not see them change.
                part.unlink()
        if not os.path.lexists(part):
            flags |= os.O_CREAT | os.O_EXCL
        return system.open_many(lambda: os.open(part, flags, 0o666))

    def _open_direct(self) -> None:
        """Second handles that bypass the page cache, on filesystems where that is known to be fast and safe."""
        if not system.direct_is_good(self.fds[self._own[0][0]] if self._own else -1):
            return
        wanted = 2 * len(self._own)  # the inputs want some too
        if system.spare_descriptors(wanted) < wanted:
            self._features["direct"] = False
            return
        self._direct += [-1] * len(self.fds)
        for i, _ in self._own:
            fd = self.fds[i]
            try:
                again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError:
                self._features["direct"] = False
                _close(self._direct)
                return
            self._names[again] = self._names[fd]
            self._direct[i] = again

    def _reserve(self) -> None:
        """Takes the disk space of all shards before a byte is read."""
        total = sum(shard.size for _, shard in self._own)
        held = sum(os.fstat(self.fds[i]).st_blocks * 512 for i, _ in self._own)
        info = os.statvfs(self._data)
        free = info.f_bavail * info.f_frsize
        if free < total - held:
            raise NoSpace(f"{self._data}: not enough space: {total - held} bytes needed, {free} free")
        for i, shard in self._own:
            fd = self.fds[i]
            code = system.fallocate(fd, shard.size)
            if code in system.UNSUPPORTED:
                self._features["fallocate"] = False
            elif code in _io.FULL:
                raise NoSpace(f"{self.name(fd)}: {os.strerror(code)}: {total} bytes needed in all")
            elif code:
                raise OutputError(f"{self.name(fd)}: cannot reserve {shard.size} bytes: {os.strerror(code)}")
            os.ftruncate(fd, shard.size)

    def _write_bytes(self, fd: int, data: bytes, offset: int = 0) -> None:
        memory = np.frombuffer(data, np.uint8)
        _io.write(self._io, np.array([[fd, offset, memory.ctypes.data, len(memory)]], np.int64), self.name)

    def _buffer(self) -> npt.NDArray[np.uint8]:
        """A buffer of this thread's own."""
        buffer: npt.NDArray[np.uint8] | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = np.empty(_BUFFER + system.PAGE, np.uint8)
        return buffer


def _close(fds: list[int]) -> None:
    """Closes those that are open."""
    while fds:
        fd = fds.pop()
        if fd >= 0:
            os.close(fd)
