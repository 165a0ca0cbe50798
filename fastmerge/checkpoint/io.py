"""Moving bytes: the primitive, and what to do when a call moves fewer than asked.

The primitive (:class:`Io`) stops at the first short transfer or error and says where; it is one call without
the GIL per unit of work. The policy is here: short transfers and interrupted calls continue, EIO and ESTALE
are tried three times, the end of the file is an error, and every error names the file and the offset.
"""

from __future__ import annotations

import errno
import importlib
import os
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from fastmerge.errors import CheckpointError, NoSpace, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

I64: TypeAlias = "npt.NDArray[np.int64]"

CALL_BYTES = 1 << 30
"""Longest row of one call; Linux moves at most 2,147,479,552 bytes at a time."""

TRIES = 3
"""Attempts at the same byte when the storage reports a passing error."""

PASSING = frozenset({errno.EIO, errno.ESTALE})
"""Errors that a network filesystem gets over."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors that mean a full disk or quota."""

_sleep = time.sleep


class Io(Protocol):
    """The primitive: rows in order from byte ``done`` of ``row`` on, until the end, a short transfer or an error.

    Every method returns the new ``(row, done, errno)``; ``row`` equal to the number of rows is the end.
    """

    def read_some(self, table: I64, row: int, done: int) -> tuple[int, int, int]:
        """Rows (fd, offset, address, nbytes): file to memory."""

    def resident(self, table: I64) -> I64:
        """For each row (fd, offset, address, nbytes) whether all of it is in the page cache; 1 where nobody knows."""

    def read_past(self, table: I64, row: int, done: int) -> tuple[int, int, int]:
        """Rows (fd, offset, direct fd, address, nbytes): file to memory, past the page cache what is not in it.

        Memory and file agree on their place in a block of 4096, and the blocks around a row are the caller's.
        """

    def write_some(self, table: I64, row: int, done: int) -> tuple[int, int, int]:
        """Rows (fd, offset, address, nbytes): memory to file."""

    def copy_some(self, table: I64, row: int, done: int) -> tuple[int, int, int]:
        """Rows (fd_in, offset_in, fd_out, offset_out, nbytes): file to file, inside the kernel."""


def native() -> Io:
    """The extension's primitive."""
    module: Any = importlib.import_module("fastmerge._native")
    return module  # type: ignore[no-any-return]


def rows(table: I64) -> I64:
    """The table as the primitive takes it: contiguous, without empty rows, none longer than one call."""
    table = np.ascontiguousarray(table, np.int64)
    sizes = table[:, -1].tolist()  # few rows: reductions of numpy would cost more
    if min(sizes, default=1) <= 0:
        table = np.ascontiguousarray(table[table[:, -1] > 0])
    if max(sizes, default=0) <= CALL_BYTES:
        return table
    # Columns that move along with the bytes: offset and address, or the two offsets of a copy.
    moving = [1, 2] if table.shape[1] == 4 else [1, 3]
    parts = []
    for row in table:
        for at in range(0, int(row[-1]), CALL_BYTES):
            part = row.copy()
            part[moving] += at
            part[-1] = min(CALL_BYTES, row[-1] - at)
            parts.append(part)
    return np.array(parts, np.int64)


def _run(
    call: Callable[[I64, int, int], tuple[int, int, int]], table: I64, recover: Callable[[int], None] | None = None
) -> tuple[int, int, int | None]:
    """Calls the primitive until the end, or until it gets no further.

    Returns:
        (row, done, errno): errno is None at the end, and 0 where nothing moved without an error.
    """
    row = done = failures = 0
    while row < len(table):
        last = row, done
        row, done, code = call(table, row, done)
        moved = (row, done) != last
        if moved:
            failures = 0
        if code == 0:
            if moved:
                continue
            return row, done, 0
        if code == errno.EINTR:
            continue
        failures += 1
        if code not in PASSING or failures >= TRIES:
            return row, done, code
        _sleep(0.05 * 4 ** (failures - 1))
        if code == errno.ESTALE and recover is not None:
            recover(int(table[row, 0]))
    return row, 0, None


def read(io: Io, table: I64, name: Callable[[int], object], recover: Callable[[int], None] | None = None) -> None:
    """Reads every row, or raises.

    Args:
        io: the primitive.
        table: int64 [R, 4] (fd, offset, address, nbytes).
        name: what to call a file descriptor in a message.
        recover: called with the fd before an attempt after ESTALE; it may put a fresh file behind the fd.

    Raises:
        CheckpointError: end of file, or an error that did not pass; with file and offset.
    """
    table = rows(table)
    row, done, code = _run(io.read_some, table, recover)
    if code is not None:
        said = f"read failed: {os.strerror(code)}" if code else "the file shrank while being read"
        raise CheckpointError(f"{name(int(table[row, 0]))}:{table[row, 1] + done}: {said}")


def read_past(
    io: Io, table: I64, name: Callable[[int], object], recover: Callable[[int], None] | None = None
) -> int | None:
    """Reads every row (fd, offset, direct fd, address, nbytes) past the page cache, or raises.

    Returns:
        The fd of a file that could not be read so: from there on all was read as :func:`read` does.

    Raises:
        CheckpointError: as :func:`read`.
    """
    row, done, code = _run(io.read_past, table)
    if code is None:
        return None
    fd = int(table[row, 0])
    if code == errno.EIO:
        raise CheckpointError(f"{name(fd)}:{table[row, 1] + done}: read failed: {os.strerror(code)}")
    rest = table[row:, [0, 1, 3, 4]]
    rest[0] += (0, done, done, -done)
    read(io, rest, name, recover)
    return fd


def write(io: Io, table: I64, name: Callable[[int], object]) -> None:
    """Writes every row of int64 [R, 4] (fd, offset, address, nbytes), or raises.

    Raises:
        OutputError: the disk is full (with the bytes that did not fit), or an error that did not pass.
    """
    table = rows(table)
    row, done, code = _run(io.write_some, table)
    if code is not None:
        where = f"{name(int(table[row, 0]))}:{table[row, 1] + done}"
        raise _write_error(where, code, int(table[row:, 3].sum()) - done)


def write_direct(io: Io, table: I64, name: Callable[[int], object]) -> bool:
    """Writes rows as :func:`write` does, through descriptors that bypass the page cache.

    Returns:
        False where the filesystem would not take them so: the caller writes the same bytes through the cache.

    Raises:
        OutputError: the disk is full.
    """
    table = rows(table)
    row, done, code = _run(io.write_some, table)
    if code in FULL:
        where = f"{name(int(table[row, 0]))}:{table[row, 1] + done}"
        raise _write_error(where, int(code or 0), int(table[row:, 3].sum()) - done)
    return code is None


def copy(io: Io, table: I64, name: Callable[[int], object]) -> I64:
    """Copies rows (fd_in, offset_in, fd_out, offset_out, nbytes) inside the kernel, as far as it can.

    Returns:
        The rows that are left for a plain copy; empty where all is done.

    Raises:
        OutputError: the disk is full.
    """
    table = rows(table)
    row, done, code = _run(io.copy_some, table)
    if code is None:
        return table[:0]
    if code in FULL:
        where = f"{name(int(table[row, 2]))}:{table[row, 3] + done}"
        raise _write_error(where, code, int(table[row:, 4].sum()) - done)
    # Whatever else stopped it (another filesystem, no such call, the end of the input, a bad block), the plain
    # copy gets past it or says which of the two files is at fault.
    rest = table[row:].copy()
    rest[0, [1, 3]] += done
    rest[0, 4] -= done
    return rest


def _write_error(where: str, code: int, rest: int) -> OutputError:
    said = os.strerror(code) if code else "nothing was written"
    if code in FULL:
        return NoSpace(f"{where}: {said}: at least {rest} more bytes are needed there")
    return OutputError(f"{where}: write failed: {said}")
