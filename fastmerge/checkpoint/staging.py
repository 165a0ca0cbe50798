"""The directory in which an output grows, its lock, and how it becomes the output.

Next to the output ``out`` lies ``.out.fastmerge-staging`` with ``lock``, ``journal.jsonl`` and ``data``.
``data`` becomes ``out`` in one rename; a killed run never leaves anything under the output's own name.
Where names cannot be swapped, an output that is replaced waits as ``old`` until ``data`` has its name; until then
``old`` is the only copy, and whatever ends the run puts it back before anything is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from fastmerge.checkpoint import system
from fastmerge.checkpoint.locks import Lock, stale
from fastmerge.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SUFFIX = ".fastmerge-staging"
_NAME_MAX = 255

LOCK, OWNER = "lock", "owner"
PARTS = "parts"
"""Where processes that write parts of one output keep what is their own."""


def staging_path(target: Path) -> Path:
    """The staging directory of an output: next to it, so on the same filesystem."""
    name = f".{target.name}{_SUFFIX}"
    if len(os.fsencode(name)) > _NAME_MAX:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}{_SUFFIX}"
    return target.parent / name


def target_of(out: str | os.PathLike[str]) -> Path:
    """The absolute path of an output, not resolved: a link at its end must be seen, and refused.

    Raises:
        OutputError: the path names no directory that could be made, or not without doubt.
    """
    given = os.fspath(out)
    path = _expanded(given)
    if given.startswith("~") and path == given:
        raise OutputError(f"{given}: there is no such user")
    name = os.path.basename(path.rstrip("/"))  # noqa: PTH119  Path drops "." at the end
    if not name.strip() or name in {".", ".."} or "\0" in path:
        raise OutputError(f"{given!r}: expected the name of a new directory")
    try:
        size = len(path.encode()) and len(name.encode())
    except UnicodeEncodeError:
        raise OutputError(f"{given!r}: expected a name in UTF-8, which the files in it can quote") from None
    if size > _NAME_MAX:
        raise OutputError(f"{given!r}: a name of {size} bytes; expected at most {_NAME_MAX}")
    return Path(os.path.abspath(path))  # noqa: PTH100


def check(target: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuses outputs that must not be written, whatever is in them.

    Raises:
        OutputError: a link, a file, the Hugging Face cache, an input or a directory that holds one, or
            (with ``overwrite``) a directory that holds no model; the current directory, or one that holds it.
    """
    if target.is_symlink():
        raise OutputError(f"{target}: a symbolic link to {os.path.realpath(target)}: name the real directory")
    if os.path.lexists(target) and not target.is_dir():
        raise OutputError(f"{target}: exists and is not a directory")
    real = Path(os.path.realpath(target))
    parts = real.parts
    if any(p.startswith(("models--", "datasets--")) for p in parts) or real.is_relative_to(_hub_cache()):
        raise OutputError(f"{target}: inside the Hugging Face cache")
    for what, where in (("current", "."), ("home", _expanded("~"))):
        if Path(os.path.realpath(where)).is_relative_to(real):
            raise OutputError(f"{target}: is or holds the {what} directory")
    for given in inputs:
        if Path(os.path.realpath(given)).is_relative_to(real):
            raise OutputError(f"{target}: holds the input {given}")
        if target.is_dir() and given.exists() and given.samefile(target):
            raise OutputError(f"{target}: is the input {given}")
    if overwrite and target.is_dir():
        files = list(target.iterdir())
        if files and not any(f.suffix == ".safetensors" for f in files):
            raise OutputError(
                f"{target}: holds no *.safetensors file; --overwrite replaces the whole directory, and only a model's"
            )


def _hub_cache() -> Path:
    env = os.environ
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or home / "hub")
    return Path(os.path.realpath(_expanded(str(cache))))


def _expanded(path: str) -> str:
    """With ``~`` replaced, where there is such a user: unlike that of Path, this raises nothing."""
    return os.path.expanduser(path)  # noqa: PTH111


class Staging:
    """A locked staging directory.

    Args:
        target: the output directory, absolute.
        features: where missing system features are noted.

    Attributes:
        root: the staging directory.
        data: what becomes the output.
        journal: the journal's path.

    Raises:
        OutputError: another process is writing the same output, or the directory cannot be made.
    """

    def __init__(self, target: Path, features: dict[str, bool]) -> None:
        self.target = target
        self.root = staging_path(target)
        self.data = self.root / "data"
        self.journal = self.root / "journal.jsonl"
        self._features = features
        self._old = self.root / "old"
        self._lock = self._acquire()
        if self._features.get("flock") is False:
            self._check_parts()

    def check_own(self) -> None:
        """Makes sure that nothing here leads to other directories: what is in ``data`` and ``old`` gets removed.

        Raises:
            OutputError: one of them is a link, or no directory.
        """
        for path in (self.data, self._old):
            if os.path.lexists(path) and not stat.S_ISDIR(path.lstat().st_mode):
                raise OutputError(f"{path}: expected a directory of its own; remove it, or leave --resume out")

    def published(self, commit: tuple[int, int] | None) -> bool:
        """Whether the directory that a journal was about to publish is the output by now."""
        try:
            info = self.target.stat()
        except FileNotFoundError:
            return False
        return commit == (info.st_dev, info.st_ino)

    def restore(self) -> None:
        """Puts back an output that an interrupted commit had moved aside."""
        if self._displaced():
            self._old.rename(self.target)
            system.sync_directory(self.target.parent)

    def clear(self) -> None:
        """Removes everything that an earlier run left, once a displaced output is back in its place."""
        self.restore()
        _remove(self.root, {LOCK, OWNER})

    def tidy(self, expected: set[str]) -> None:
        """Removes from ``data`` whatever is not expected there."""
        _remove(self.data, expected)

    def publish(self) -> None:
        """Makes ``data`` the output, atomically where the filesystem can; durable when this returns.

        Raises:
            OutputError: the output appeared meanwhile, or cannot be replaced.
        """
        if os.path.lexists(self.target):
            code = system.rename_exchange(self.data, self.target)
            if code in system.UNSUPPORTED:
                self._features["rename_exchange"] = False
                self._replace()
                code = 0
        else:
            code = system.rename_new(self.data, self.target)
            if code in system.UNSUPPORTED:
                self._features["rename_noreplace"] = False
                self.data.rename(self.target)
                code = 0
        if code:
            raise OutputError(f"{self.target}: cannot put the output in place: {os.strerror(code)}")
        system.sync_directory(self.target.parent)

    def release(self, *, remove: bool) -> None:
        """Gives the lock back; with ``remove`` the staging directory goes too, unless it holds the only old output."""
        if not self._lock.held:
            return
        with contextlib.suppress(OSError):
            self.restore()
        remove = remove and not self._displaced()
        if remove:
            self.clear()
        # The lock goes last: whoever takes it next finds an empty directory.
        self._lock.release(remove=remove)
        if remove:
            with contextlib.suppress(OSError):
                self.root.rmdir()

    def _acquire(self) -> Lock:
        return Lock(self.root / LOCK, self.root / OWNER, str(self.target), self._features)

    def _check_parts(self) -> None:
        """Without locks, parts of the output that are being written are known by their owners only."""
        for owner in sorted((self.root / PARTS).glob("*.owner")):
            if not stale(owner):
                self._lock.release(remove=False)
                raise OutputError(f"{self.target}: already running: a part of it; if it is not, remove {owner}")

    def _displaced(self) -> bool:
        """Whether the output that was to be replaced is only here."""
        return self._old.is_dir() and not self._old.is_symlink() and not os.path.lexists(self.target)

    def _replace(self) -> None:
        """The output moves aside and ``data`` takes its name; if that fails, the output is put back."""
        try:
            self.target.rename(self._old)
            self.data.rename(self.target)
        except BaseException:
            # Should this fail too, release() and the next run try again, and remove nothing before.
            with contextlib.suppress(OSError):
                self.restore()
            raise


def _remove(directory: Path, keep: set[str]) -> None:
    for path in list(directory.iterdir()):
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            import shutil

            shutil.rmtree(path)
        else:
            path.unlink()
