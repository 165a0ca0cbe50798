"""A lock that a process holds for as long as it lives, on filesystems with ``flock`` and without."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from pathlib import Path

from fastmerge.checkpoint import system
from fastmerge.errors import OutputError


class Lock:
    """A held lock.

    Args:
        path: of the file that is locked; its directory is made.
        owner: of the file that stands for the lock where the filesystem has no ``flock``.
        what: is locked, for messages.
        features: where missing system features are noted.
        shared: whether others may hold it too; without ``flock`` such a lock keeps nobody out.

    Raises:
        OutputError: another process holds it.
    """

    def __init__(self, path: Path, owner: Path, what: str, features: dict[str, bool], *, shared: bool = False) -> None:
        self._path = path
        self._owner = owner
        self._what = what
        self._features = features
        self._shared = shared
        self._fd: int | None = self._acquire()

    @property
    def held(self) -> bool:
        """Whether it was not given back yet."""
        return self._fd is not None

    def release(self, *, remove: bool) -> None:
        """Gives the lock back; with ``remove`` its file goes too."""
        if self._fd is None:
            return
        if remove:
            self._path.unlink(missing_ok=True)
        if not self._shared:
            self._owner.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = None

    def alone(self) -> bool:
        """Whether nobody shares a shared lock; this holder then has it for itself, until :meth:`share`."""
        assert self._fd is not None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.share()
            return False
        return True

    def share(self) -> None:
        """Shares the lock again."""
        assert self._fd is not None
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def _acquire(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        directory = self._path.parent
        while True:
            directory.mkdir(exist_ok=True)
            if not stat.S_ISDIR(directory.lstat().st_mode):
                raise OutputError(f"{directory}: expected a directory of its own")
            try:
                fd = os.open(self._path, flags, 0o666)
            except FileNotFoundError:
                continue
            try:
                if self._take(fd):
                    break
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, _self(), 0)
        return fd

    def _take(self, fd: int) -> bool:
        """Locks; False where the file was removed by its last owner meanwhile."""
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OutputError(f"{self._what}: already running: {_owner(os.pread(fd, 4096, 0))}") from None
            if error.errno not in system.UNSUPPORTED | {errno.ENOLCK}:
                raise
            self._features["flock"] = False
            if not self._shared:
                self._take_without_flock()
            return True
        try:
            info = self._path.stat()
        except FileNotFoundError:
            return False
        mine = os.fstat(fd)
        return (info.st_dev, info.st_ino) == (mine.st_dev, mine.st_ino)

    def _take_without_flock(self) -> None:
        """A file that only one process can create; one of a dead process on this host is removed."""
        while True:
            try:
                fd = os.open(self._owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileExistsError:
                text = self._owner.read_bytes()
                if not _dead(text):
                    raise OutputError(
                        f"{self._what}: already running: {_owner(text)}; if it is not, remove {self._owner}"
                    ) from None
                self._owner.unlink(missing_ok=True)
                continue
            os.write(fd, _self())
            os.close(fd)
            return


def stale(owner: Path) -> bool:
    """Whether the process that made a lock's owner file is known to be gone, or the file is."""
    try:
        return _dead(owner.read_bytes())
    except FileNotFoundError:
        return True


def _self() -> bytes:
    return json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode()


def _parse_owner(text: bytes) -> tuple[int, str] | None:
    try:
        content = json.loads(text)
        return int(content["pid"]), str(content["host"])
    except (ValueError, TypeError, KeyError):
        return None


def _owner(text: bytes) -> str:
    owner = _parse_owner(text)
    return f"process {owner[0]} on {owner[1]} writes it" if owner else "another process writes it"


def _dead(text: bytes) -> bool:
    owner = _parse_owner(text)
    if owner is None or owner[1] != os.uname().nodename:
        return False
    try:
        os.kill(owner[0], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
