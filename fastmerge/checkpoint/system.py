"""The Linux calls that Python does not offer, each with a fallback where the system lacks it."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import stat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_AT_FDCWD = -100
_EXT4, _XFS, _BTRFS, _F2FS = 0xEF53, 0x58465342, 0x9123683E, 0xF2F52010

DIRECT_READS = frozenset({_EXT4, _XFS, _BTRFS, _F2FS})
"""Filesystems of local disks, whose direct reads are coherent with the page cache and fast."""

PAGE = max(4096, os.sysconf("SC_PAGE_SIZE"))
"""What direct writes are aligned to: a multiple of every disk's block, and of the pages that others may be writing."""

RESERVE = 24
"""Descriptors that are left for others: threads, devices, temporary files."""

UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})
"""What a filesystem answers to a call that it does not have."""


def _function(name: str, *argtypes: Any) -> Callable[..., int] | None:
    try:
        function = getattr(_libc, name)
    except AttributeError:
        return None
    function.argtypes = argtypes
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


_fallocate = _function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = _function("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_renameat2 = _function("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)

_fstatfs = _function("fstatfs", ctypes.c_int, ctypes.c_char_p)

_memoryview = ctypes.pythonapi.PyMemoryView_FromMemory
_memoryview.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_memoryview.restype = ctypes.py_object


def _call(function: Callable[..., int] | None, *arguments: Any) -> int:
    """Calls a libc function; 0, or its errno. Interrupted calls are repeated."""
    if function is None:
        return errno.ENOSYS
    while True:
        if function(*arguments) == 0:
            return 0
        code = ctypes.get_errno()
        if code != errno.EINTR:
            return code


def fallocate(fd: int, nbytes: int) -> int:
    """Reserves the first ``nbytes`` bytes of a file on disk and extends it to that size; 0 or errno.

    Unlike ``posix_fallocate`` it never writes zeros where the filesystem cannot reserve (NFS before 4.2).
    """
    return _call(_fallocate, fd, 0, 0, nbytes) if nbytes else 0


def direct_is_good(fd: int) -> bool:
    """Whether the file is on ext4 or XFS, whose direct writes are coherent with the page cache and fast."""
    return filesystem(fd) in (_EXT4, _XFS)


def filesystem(fd: int) -> int:
    """The number of the kind of filesystem that a file is on; 0 where it is not known, or nothing is direct."""
    if _fstatfs is None or fd < 0 or not hasattr(os, "O_DIRECT"):
        return 0
    answer = ctypes.create_string_buffer(256)
    if _call(_fstatfs, fd, answer):
        return 0
    return ctypes.c_long.from_buffer(answer).value


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Starts writing dirty pages of a range to the disk without waiting for them.

    Only a hint: without it the same bytes arrive at the next fdatasync, in one burst.
    """
    _call(_sync_file_range, fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def rename_new(source: Path, target: Path) -> int:
    """Renames unless ``target`` exists, atomically; 0 or errno (EINVAL, ENOSYS where unsupported)."""
    return _call(_renameat2, _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)


def rename_exchange(source: Path, target: Path) -> int:
    """Swaps two names atomically; 0 or errno (EINVAL, ENOSYS where unsupported)."""
    return _call(_renameat2, _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable; filesystems that cannot are left to their own promise."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that appears complete or not at all, in place of one that is there; durable on return."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(path)
    sync_directory(path.parent)


def view(address: int, nbytes: int) -> memoryview:
    """The bytes at an address, read-only and without a copy; the caller keeps them alive."""
    return _memoryview(address, nbytes, 0x100)  # type: ignore[no-any-return]


def open_many(opener: Callable[[], int]) -> int:
    """Runs ``opener``; out of file descriptors, raises the soft limit to the hard one and tries once more."""
    try:
        return opener()
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return opener()


def spare_descriptors(wanted: int) -> int:
    """How many more files this process may open, besides a reserve; raises the soft limit as far as is wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  names only
    except OSError:
        used = RESERVE
    need = used + wanted + RESERVE
    if soft == resource.RLIM_INFINITY or need <= soft:
        return wanted
    if hard == resource.RLIM_INFINITY or hard > soft:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(0, min(wanted, soft - used - RESERVE))


def open_regular(path: str | os.PathLike[str]) -> int:
    """Opens a regular file for reading, links followed; the caller closes it.

    Whatever is no regular file is not opened: a pipe would wait for its writer, a device may act on it.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    _check_regular(os.stat(path), path)  # noqa: PTH116  paths as text too
    fd = open_many(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    try:
        _check_regular(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """The first ``most`` bytes of a regular file.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open(open_regular(path), "rb") as file:
        # Asked for more than there is, read() would make room for all of it.
        return file.read(min(most, os.fstat(file.fileno()).st_size + 1))


def _check_regular(info: os.stat_result, path: str | os.PathLike[str]) -> None:
    kind = _KINDS.get(stat.S_IFMT(info.st_mode), "something else")
    if kind:
        raise OSError(errno.EINVAL, f"expected a regular file, got {kind}", os.fspath(path))


_KINDS = {
    stat.S_IFREG: "",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
