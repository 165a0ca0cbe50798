"""Input files of a merge, opened once each and shared by all threads."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from fastmerge.checkpoint import io as _io
from fastmerge.checkpoint.system import open_many
from fastmerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from fastmerge.checkpoint.io import I64, Io
    from fastmerge.checkpoint.model import Checkpoint, ShardFile


class Files:
    """File descriptors of checkpoints, opened at first use; equal files share one.

    Args:
        checkpoints: position in this sequence is the ``model`` of the methods.
        io: the primitive; the extension's by default.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], io: Io | None = None) -> None:
        self._files = [c.files for c in checkpoints]
        self._io = io or _io.native()
        self._lock = threading.Lock()
        self._fds: dict[tuple[int, int, int, int], int] = {}
        self._by_fd: dict[int, ShardFile] = {}
        self._closed = False

    def fd(self, model: int, file: int) -> int:
        """The descriptor of one file of one model.

        Raises:
            CheckpointError: it cannot be opened, or is not the file whose header was read.
        """
        shard = self._files[model][file]
        fd = self._fds.get(shard.identity)
        if fd is not None:
            return fd
        with self._lock:
            if self._closed:
                raise ValueError("the files are closed")
            if shard.identity not in self._fds:
                fd = _open(shard)
                self._fds[shard.identity] = fd
                self._by_fd[fd] = shard
            return self._fds[shard.identity]

    def read(self, table: I64) -> None:
        """Reads rows (fd, offset, address, nbytes) into memory; any thread, one call without the GIL.

        Raises:
            CheckpointError: the file shrank, or an error that three attempts did not get past.
        """
        _io.read(self._io, table, self._name, self._reopen)

    def close(self) -> None:
        """Closes every file."""
        with self._lock:
            self._closed = True
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
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = open_many(lambda: os.open(shard.path, flags))
    except OSError as error:
        raise CheckpointError(f"{shard.path}: cannot open: {error.strerror}") from None
    info = os.fstat(fd)
    if (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns) != shard.identity:
        os.close(fd)
        raise CheckpointError(f"{shard.path}: the file was changed or replaced after its header was read")
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd
