"""Input files of a merge, opened once each and shared by all threads."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from fastmerge.checkpoint import io as _io
from fastmerge.checkpoint import system
from fastmerge.checkpoint.past import Past
from fastmerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from fastmerge.checkpoint.io import I64, Io
    from fastmerge.checkpoint.model import Checkpoint, ShardFile


_Identity = tuple[int, int, int, int]


class Files:
    """File descriptors of checkpoints, opened at first use; equal files share one.

    Where a process may not open all of them at once, handles stand for them, and the descriptors behind are closed
    and opened as they are needed. Where it may open all of them twice, some are read past the page cache.

    Args:
        checkpoints: position in this sequence is the ``model`` of the methods.
        io: the primitive; the extension's by default.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], io: Io | None = None) -> None:
        self._files = [c.files for c in checkpoints]
        self._io = io or _io.native()
        self._lock = threading.Condition()
        self._fds: dict[_Identity, int] = {}
        self._by_fd: dict[int, ShardFile] = {}
        self._closed = False
        every = {file.identity: file for files in self._files for file in files}
        spare = system.spare_descriptors(2 * len(every))
        self._past = Past(self._io) if spare >= 2 * len(every) else None
        self._most = None if spare >= len(every) else max(spare, 1)
        self._handles = list(every.values()) if self._most else []
        self._handle_of = {file.identity: i for i, file in enumerate(self._handles)}
        self._users: dict[_Identity, int] = dict.fromkeys(self._handle_of, 0)

    def fd(self, model: int, file: int) -> int:
        """What :meth:`read` and :meth:`use` know one file of one model by: its descriptor, or a handle.

        Raises:
            CheckpointError: it cannot be opened, or is not the file whose header was read.
        """
        shard = self._files[model][file]
        fd = self._fds.get(shard.identity)
        if fd is not None and self._most is None:
            return fd
        with self._lock:
            if self._closed:
                raise ValueError("the files are closed")
            if self._most is not None:
                return self._handle_of[shard.identity]
            if shard.identity not in self._fds:
                self._keep(shard)
            return self._fds[shard.identity]

    def read(self, table: I64) -> None:
        """Reads rows (fd, offset, address, nbytes) into memory; any thread, one call without the GIL.

        Raises:
            CheckpointError: the file shrank, or an error that three attempts did not get past.
        """
        self.use(table, self._read)

    def cold(self, table: I64) -> list[bool]:
        """Which rows the page cache does not hold, of files that are read past it."""
        return self._past.cold(table) if self._past is not None else [False] * len(table)

    def read_past(self, table: I64, cold: Sequence[bool]) -> None:
        """Reads rows as :meth:`read`, the cold ones past the page cache.

        Their addresses are congruent to their offsets modulo a block of 4096, and the blocks around them are the
        caller's.
        """
        if self._past is not None:
            table = self._past.read(table, cold, self._name, self._reopen)
        if len(table):
            self.read(table)

    def _read(self, table: I64) -> None:
        _io.read(self._io, table, self._name, self._reopen)

    def use(self, table: I64, call: Callable[[I64], None]) -> None:
        """Calls with the rows of a table whose first column is what :meth:`fd` gave, with open descriptors there.

        Raises:
            CheckpointError: as :meth:`fd`.
        """
        if self._most is None:
            call(table)
            return
        for handle in dict.fromkeys(table[:, 0].tolist()):
            shard = self._handles[handle]
            rows = table[table[:, 0] == handle]
            rows[:, 0] = self._borrow(shard)
            try:
                call(rows)
            finally:
                with self._lock:
                    self._users[shard.identity] -= 1
                    self._lock.notify()

    def _borrow(self, shard: ShardFile) -> int:
        """A descriptor that is not closed before its user is gone; the one that was not used for longest makes room."""
        with self._lock:
            while shard.identity not in self._fds and len(self._fds) >= (self._most or 0):
                idle = next((i for i in self._fds if not self._users[i]), None)
                if idle is None:
                    self._lock.wait()
                else:
                    fd = self._fds.pop(idle)
                    del self._by_fd[fd]
                    os.close(fd)
            if self._closed:
                raise ValueError("the files are closed")
            if shard.identity in self._fds:
                self._fds[shard.identity] = self._fds.pop(shard.identity)
            else:
                self._keep(shard)
            self._users[shard.identity] += 1
            return self._fds[shard.identity]

    def _keep(self, shard: ShardFile) -> None:
        fd = _open(shard)
        self._fds[shard.identity] = fd
        self._by_fd[fd] = shard
        if self._past is not None:
            self._past.add(fd)

    def close(self) -> None:
        """Closes every file."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            if self._past is not None:
                self._past.close()
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()
            self._by_fd.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _name(self, fd: int) -> object:
        shard = self._by_fd.get(fd)
        return shard.path if shard else f"fd {fd}"

    def _reopen(self, fd: int) -> None:
        """Puts a fresh handle of the same file behind an fd whose NFS handle went stale."""
        shard = self._by_fd.get(fd)
        if shard is not None:
            fresh = _open(shard)
            os.dup2(fresh, fd, inheritable=False)
            os.close(fresh)


def _open(shard: ShardFile) -> int:
    try:
        fd = system.open_regular(shard.path)
    except OSError as error:
        raise CheckpointError(f"{shard.path}: cannot open: {error.strerror}") from None
    try:
        info = os.fstat(fd)
    except OSError as error:
        os.close(fd)
        raise CheckpointError(f"{shard.path}: cannot read: {error.strerror}") from None
    if (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns) != shard.identity:
        os.close(fd)
        raise CheckpointError(f"{shard.path}: the file was changed or replaced after its header was read")
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd
