"""One output, written by several processes, on one machine or many: each writes a part, and one of them publishes.

In the staging directory, ``parts`` holds for each part its journal (``3-of-8.jsonl``), its lock, and once it is done
its report (``3-of-8.json``); ``merge`` says which merge they are of. All parts write to the same ``data``. Their
processes share the output's lock, which whoever publishes has alone: that is a run of the whole merge with ``resume``,
which takes over what the parts did.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.checkpoint import journal as _journal
from fastmerge.checkpoint import system
from fastmerge.checkpoint.locks import Lock
from fastmerge.checkpoint.staging import LOCK, OWNER, PARTS, Staging
from fastmerge.errors import OutputError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_PARTS = 100_000


class Part(NamedTuple):
    """One of ``of`` parts of an output; numbers start at 1."""

    number: int
    of: int

    @classmethod
    def read(cls, text: str | tuple[int, int]) -> Part:
        """``"3/8"`` or ``(3, 8)``.

        Raises:
            RecipeError: for anything else.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text) if isinstance(text, str) else None
        part = cls(*map(int, match.groups() if match else text if not isinstance(text, str) else (0, 0)))
        if not 1 <= part.number <= part.of <= MOST_PARTS:
            raise RecipeError(f"part {text!r}: expected NUMBER/COUNT from 1/1 to {MOST_PARTS}/{MOST_PARTS}")
        return part

    @property
    def name(self) -> str:
        """As files are called after it."""
        return f"{self.number}-of-{self.of}"

    def __str__(self) -> str:
        return f"part {self.number}/{self.of}"


class PartStaging(Staging):
    """The staging directory of an output as one of the processes sees it that write its parts.

    Args:
        target: the output directory, absolute.
        features: where missing system features are noted.
        part: which this process writes.

    Attributes:
        report: the path of what the part says when it is done.

    Raises:
        OutputError: a process writes the whole output, or the same part.
    """

    def __init__(self, target: Path, features: dict[str, bool], part: Part) -> None:
        super().__init__(target, features)
        self.parts = self.root / PARTS
        self.journal = self.parts / f"{part.name}.jsonl"
        self.report = self.parts / f"{part.name}.json"
        own = self.parts / f"{part.name}.lock", self.parts / f"{part.name}.owner"
        try:
            self._own = Lock(*own, f"{target}, {part}", features)
        except BaseException:
            self._lock.release(remove=False)
            raise

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One part at a time creates files that all write to, or looks for those of another merge."""
        fd = os.open(self.parts / "turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if self._features.get("flock") is not False:
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def adopt(self, fingerprint: str, layout: str, *, keep: bool) -> None:
        """Makes the staging directory that of a merge, and removes what another one left.

        Raises:
            OutputError: that merge is running, or ``keep`` forbids it.
        """
        marker = self.parts / "merge"
        mine = {"fingerprint": fingerprint, "layout": layout}
        said = report_of(marker)
        if said == mine:
            return
        whole = self.root / "journal.jsonl"
        state = _journal.load(whole) if said is None else None
        if said is not None or (state and (state.fingerprint, state.layout) != (fingerprint, layout)):
            if keep or self._features.get("flock") is False or not self._lock.alone():
                raise OutputError(
                    f"{self.root}: belongs to another recipe, seed, input or shard size, and is running or to be kept; "
                    f"remove it to discard it"
                )
            for path in [whole, *self.parts.glob("*.json"), *self.parts.glob("*.jsonl")]:
                path.unlink(missing_ok=True)
            self._lock.share()
        system.write_whole(marker, json.dumps(mine).encode())

    def restore(self) -> None:
        """Is left to whoever publishes."""

    def clear(self) -> None:
        """Removes what an earlier run of the same part left of its own."""
        for path in (self.journal, self.report):
            path.unlink(missing_ok=True)

    def release(self, *, remove: bool) -> None:
        """Gives the locks back; with ``remove`` the part's own files go too."""
        if not self._lock.held:
            return
        if remove:
            self.clear()
        self._own.release(remove=True)
        self._lock.release(remove=False)

    def _acquire(self) -> Lock:
        return Lock(self.root / LOCK, self.root / OWNER, str(self.target), self._features, shared=True)

    def _check_parts(self) -> None:
        """Others are welcome."""


def load(root: Path, fingerprint: str, layout: str) -> Iterator[tuple[list[_journal.Range], dict[str, Any] | None]]:
    """What the parts of an output have written so far: ranges, and the report of a part that is done.

    Raises:
        OutputError: a journal is that of another merge.
    """
    for path in sorted((root / PARTS).glob("*.jsonl")):
        state = _journal.load(path)
        if state is None:
            continue
        if (state.fingerprint, state.layout) != (fingerprint, layout):
            raise OutputError(f"{path}: holds an interrupted run of another recipe, seed, input or shard size")
        yield state.ranges, report_of(path.with_suffix(".json"))


def report_of(path: Path) -> dict[str, Any] | None:
    """What a part says that is done; None where it is not."""
    try:
        found = json.loads(system.read_regular(path, 1 << 24))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
