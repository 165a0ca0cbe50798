"""Reads past the page cache: for which files, for which of their bytes, and what happens where one is refused.

Through the cache every byte is copied once more, and pages are found, filled and kept for it: 4.4 s of system time
for 6 GB at 0.6 GB/s by four threads, and 0.2 s at 2.0 GB/s past it (two busy cores, ext4). What is in the cache already
is read from there, and stays there. The memory has to be of huge pages, as slots are: a request has room for so many
pieces of memory (254 on virtio), and with pages of 4 KiB the same reads reached 0.55 GB/s.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.checkpoint import io as _io
from fastmerge.checkpoint import system
from fastmerge.checkpoint.content import SAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from fastmerge.checkpoint.io import I64, Io

SWITCH = "FASTMERGE_DIRECT"
"""Environment variable: 0 for reads through the page cache only."""

LEAST = 64 << 10
"""Bytes of a row below which it is read through the cache: past it, each would be a request to the disk of its own."""

MISSING = 1 / 16
"""Share of the inputs that may be on the disk only where they are said to be in the page cache."""

BEYOND = 4 << 20
"""Bytes past the end of a file where no cache has a page of it, whatever the size of its pages."""


def in_cache(paths: Iterable[Path], io: Io | None = None) -> bool:
    """Whether the page cache holds files, as far as 64 pages of each tell, between those that :mod:`.content` reads.

    Args:
        paths: of the files.
        io: the primitive; the extension's by default.

    Returns:
        False where the kernel does not tell, and where a file cannot be opened.
    """
    io = io or _io.native()
    total, found = 0, 0.0
    for path in paths:
        try:
            fd = system.open_regular(path)
        except OSError:
            return False
        try:
            size = os.fstat(fd).st_size
            places = [size * (2 * i + 1) // (2 * SAMPLES) for i in range(SAMPLES)]
            *held, beyond = io.resident(np.array([(fd, at, 0, 1) for at in (*places, size + BEYOND)])).tolist()
        finally:
            os.close(fd)
        if beyond:  # of files that a process may not write, some kernels say this of every page
            return False
        total, found = total + size, found + size * sum(held) / SAMPLES
    return found >= (1 - MISSING) * total


def open_past(fd: int) -> int:
    """A second descriptor of an open file, which reads past the page cache; the caller closes it.

    Raises:
        OSError: whose text says why files there are not read so.
    """
    if os.environ.get(SWITCH) == "0":
        raise OSError(f"{SWITCH}=0")
    kind = system.filesystem(fd)
    if kind not in system.DIRECT_READS:
        raise OSError(f"its kind of filesystem ({kind:#x}) is not known to be good at it")
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)


class Past:
    """Second descriptors of files, by their first ones.

    Args:
        io: the primitive.
    """

    def __init__(self, io: Io) -> None:
        self._io = io
        self._lock = threading.Lock()
        self._direct: dict[int, int] = {}
        self._opened: list[int] = []

    def add(self, fd: int) -> None:
        """Opens a file once more, where that helps."""
        try:
            direct = open_past(fd)
        except OSError:
            return
        self._direct[fd] = direct
        self._opened.append(direct)

    def cold(self, table: I64) -> list[bool]:
        """Which rows (fd, offset, address, nbytes) to read past the cache: of such files, and not resident."""
        asked = [n >= LEAST and fd in self._direct for fd, _, _, n in table.tolist()]
        if not any(asked):
            return asked
        return [a and not there for a, there in zip(asked, self._io.resident(table).tolist(), strict=True)]

    def read(
        self, table: I64, cold: Sequence[bool], name: Callable[[int], object], recover: Callable[[int], None]
    ) -> I64:
        """Reads the cold rows; the others are returned.

        Raises:
            CheckpointError: as :func:`fastmerge.checkpoint.io.read`.
        """
        direct = [self._direct.get(fd, -1) if c else -1 for fd, c in zip(table[:, 0].tolist(), cold, strict=True)]
        which = np.array(direct, np.int64) >= 0
        if which.any():
            rows = np.insert(table[which], 2, [d for d in direct if d >= 0], axis=1)
            refused = _io.read_past(self._io, rows, name, recover)
            if refused is not None:
                with self._lock:  # others may be reading with it: it stays open
                    self._direct.pop(refused, None)
        return table[~which]

    def close(self) -> None:
        """Closes the second descriptors."""
        with self._lock:
            self._direct.clear()
            while self._opened:
                os.close(self._opened.pop())
