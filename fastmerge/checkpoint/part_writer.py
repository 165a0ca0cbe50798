"""Writing one part of an output."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.checkpoint import journal as _journal
from fastmerge.checkpoint import system
from fastmerge.checkpoint.parts import Part, PartStaging, report_of
from fastmerge.checkpoint.ranges import Ranges
from fastmerge.checkpoint.staging import PARTS, Staging
from fastmerge.checkpoint.writer import Writer
from fastmerge.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastmerge.checkpoint.io import I64
    from fastmerge.checkpoint.layout import Layout


class PartWriter(Writer):
    """Writes one part of an output; :meth:`finish` takes the place of :meth:`commit`.

    Args:
        out: the output directory.
        layout: its shards.
        part: which is written.
        mine: (shard, offset, bytes) of what it holds.
        how: as of :class:`Writer`. With ``resume`` what is left of another merge is kept, and refused; what is left
            of the same merge is continued with and without.

    Attributes:
        nbytes: of the part.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        layout: Layout,
        *,
        part: Part,
        mine: Iterable[tuple[int, int, int]],
        **how: Any,
    ) -> None:
        self._part = part
        self.nbytes = 0
        self._mine = [Ranges() for _ in layout.shards]
        for shard, offset, nbytes in mine:
            self._mine[shard].add(offset, offset + nbytes)
            self.nbytes += nbytes
        super().__init__(out, layout, **how)

    @property
    def skips(self) -> bool:
        """What other parts hold is skipped."""
        return True

    def done(self, shard: int, offset: int, nbytes: int) -> bool:
        """Whether a range is written, or another part's."""
        return not self._mine[shard].common(offset, offset + nbytes) or super().done(shard, offset, nbytes)

    def write(self, table: I64) -> None:
        """Writes of rows what is the part's own: small neighbours of other parts may come with it."""
        rows = [
            (shard, first, address + first - offset, last - first)
            for shard, offset, address, nbytes in table.tolist()
            for first, last in self._mine[shard].common(offset, offset + nbytes)
        ]
        if rows:
            super().write(np.array(rows, np.int64))

    def finish(self, report: str) -> None:
        """Says that the part is done: everything in it is durable.

        Args:
            report: what :attr:`Writer.parts` of whoever publishes has of it, as JSON.

        Raises:
            OutputError: ranges are missing, or the disk is full.
        """
        self.sync()
        missing = [
            f"{shard.name}: bytes {a} to {b}"
            for shard, mine, ranges in zip(self.layout.shards, self._mine, self._ranges, strict=True)
            for first, last in mine.spans()
            for a, b in ranges.missing(first, last)
        ]
        if missing:
            raise OutputError(f"{self.target}, {self._part}: not written: {'; '.join(missing[:5])}")
        self._worth_keeping = True
        assert isinstance(self._staging, PartStaging)
        system.write_whole(self._staging.report, report.encode())

    def commit(self) -> None:
        """Is not for a part.

        Raises:
            ValueError: always.
        """
        raise ValueError("a part is finished, not committed")

    def all_done(self) -> bool:
        """Whether every part of as many has finished."""
        return len([*(self.staging / PARTS).glob(f"*-of-{self._part.of}.json")]) == self._part.of

    def _own_shards(self) -> set[int]:
        return {shard for shard, mine in enumerate(self._mine) if mine.spans()}

    def _lock_staging(self) -> Staging:
        return PartStaging(self.target, self.features, self._part)

    def _refuse_existing(self, *, resume: bool) -> None:
        if os.path.lexists(self.target):
            said, changed = self._finished()
            if said and not changed:
                self.finished = True
                return
        super()._refuse_existing(resume=resume)

    def _begin(self, state: _journal.State | None, *, resume: bool) -> None:
        staging = self._staging
        assert isinstance(staging, PartStaging)
        with staging.turn():
            self._refuse_existing(resume=resume)
            if self.finished:
                self._close(remove=True)
                return
            staging.adopt(self._fingerprint, self.layout.digest, keep=resume)
            state = _journal.load(staging.journal)
            if state is not None:
                staging.check_own()
            staging.data.mkdir(exist_ok=True)
            self._shards.open()
            self._journal = _journal.Journal(staging.journal, state)
            if state is None:
                staging.report.unlink(missing_ok=True)
                self._journal.begin(self._fingerprint, self.layout.digest)
                for directory in (staging.data, staging.parts, self.staging, self.target.parent):
                    system.sync_directory(directory)
        self._worth_keeping = state is not None
        self.said = report_of(staging.report) if state is not None else None
        self._take(state.ranges if state else (), trusted=self.said is not None)
