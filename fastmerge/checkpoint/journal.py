"""The journal of a merge: which ranges of the output are on disk, with their checksums.

One JSON object per line. The first names the merge (``fingerprint``) and the output (``layout``); then
``{"s": shard, "o": offset, "n": bytes, "x": xxh3_64}`` for every range, appended after the fdatasync of its
data; ``{"void": shard}`` takes back a shard whose fdatasync failed; ``{"commit": [device, inode]}`` says that
all is durable and which directory is about to become the output.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.system import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

VERSION = 1

Range = tuple[int, int, int, int]
"""(shard, offset, bytes, xxh3_64)"""


@dataclass
class State:
    """What a journal says.

    Attributes:
        fingerprint: of the merge.
        layout: digest of the output's layout.
        ranges: durable ranges, in the order written.
        commit: (device, inode) of the directory that was to become the output; None before.
        length: bytes of the journal up to the last whole line.
    """

    fingerprint: str
    layout: str
    ranges: list[Range] = field(default_factory=list)
    commit: tuple[int, int] | None = None
    length: int = 0


def load(path: Path) -> State | None:
    """Reads a journal; None where there is none that names its merge.

    A line cut short by a crash ends it; whatever follows a damaged line is not trusted.
    """
    state: State | None = None
    for line, record in _records(path):
        if state is None:
            if record.get("fastmerge") != VERSION:
                return None
            state = State(str(record.get("fingerprint")), str(record.get("layout")))
        elif "void" in record:
            state.ranges = [r for r in state.ranges if r[0] != record["void"]]
            state.commit = None
        elif "commit" in record:
            device, inode = record["commit"]
            state.commit = (int(device), int(inode))
        else:
            state.ranges.append(_range(record))
            state.commit = None
        state.length += len(line)
    return state


def _range(record: dict[str, Any]) -> Range:
    return record["s"], record["o"], record["n"], int(record["x"], 16)


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    try:
        file = open(open_regular(path), "rb")  # noqa: PTH123, SIM115  a descriptor
    except FileNotFoundError:
        return
    with file:
        for line in file:
            record = _parse(line)
            if record is None:
                return
            yield line, record


def _parse(line: bytes) -> dict[str, Any] | None:
    """One whole, sound line; else None."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
        if "x" in record:
            int(record["x"], 16)
            numbers = [record["s"], record["o"], record["n"]]
        elif "commit" in record:
            numbers = record["commit"]
            if len(numbers) != 2:
                return None
        elif "void" in record:
            numbers = [record["void"]]
        else:
            numbers = []
            if "fastmerge" not in record:
                return None
    except (ValueError, TypeError, KeyError):
        return None
    return record if isinstance(record, dict) and all(type(n) is int and n >= 0 for n in numbers) else None


class Journal:
    """An open journal, for appending.

    Args:
        path: the file.
        state: what :func:`load` found, to continue after its last whole line; None starts a new journal.
    """

    def __init__(self, path: Path, state: State | None = None) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o666)
        os.ftruncate(self._fd, state.length if state else 0)
        os.lseek(self._fd, 0, os.SEEK_END)

    def begin(self, fingerprint: str, layout: str) -> None:
        """Writes the first line."""
        self._append([{"fastmerge": VERSION, "fingerprint": fingerprint, "layout": layout}])

    def done(self, ranges: Iterable[Range]) -> None:
        """Records ranges whose data is durable; durable itself when this returns."""
        lines = [{"s": s, "o": o, "n": n, "x": f"{x:016x}"} for s, o, n, x in ranges]
        if lines:
            self._append(lines)

    def void(self, shard: int) -> None:
        """Takes back everything recorded of a shard."""
        self._append([{"void": shard}])

    def commit(self, device: int, inode: int) -> None:
        """Records that everything is durable and about to be renamed."""
        self._append([{"commit": [device, inode]}])

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def _append(self, records: list[dict[str, Any]]) -> None:
        text = "".join([json.dumps(r, separators=(",", ":")) + "\n" for r in records]).encode()
        start = os.lseek(self._fd, 0, os.SEEK_CUR)
        try:
            while text:
                text = text[os.write(self._fd, text) :]
        except OSError:
            # Half a line would end the journal for whoever reads it, with all that is appended later.
            os.ftruncate(self._fd, start)
            os.lseek(self._fd, start, os.SEEK_SET)
            raise
        os.fdatasync(self._fd)
