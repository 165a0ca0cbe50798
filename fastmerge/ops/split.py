"""One program for tensors whose parameters differ in more than numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from fastmerge.ops.program import Bound, Program
from fastmerge.ops.segments import GROUP, I64, Segments
from fastmerge.ops.spec import Op


def by_kind(kinds: Sequence[Hashable], build: Callable[[list[int]], Program]) -> Program:
    """A program for groups that must share something: built once where they do, else once per kind.

    Args:
        kinds: of each group.
        build: makes the program of the groups with the given numbers.
    """
    members: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        members.setdefault(kind, []).append(i)
    if len(members) == 1:
        return build(list(range(len(kinds))))
    return SplitProgram([(np.array(m, np.int64), build(m)) for m in members.values()], len(kinds))


class _Bounds:
    """Several, one behind the other."""

    def __init__(
        self, parts: Sequence[Bound], rows: Sequence[tuple[I64, Segments]], whole: Segments, asked: Sequence[bool]
    ) -> None:
        self.parts = parts
        self.rows = rows
        self._whole = whole
        self.asked = asked

    def run(self) -> None:
        """Starts each."""
        for part in self.parts:
            part.run()
        if len(self._whole.nonfinite):
            for rows, some in self.rows:
                self._whole.nonfinite[rows] = some.nonfinite

    def move(self, segments: Segments, ops: Sequence[Op]) -> bool:
        """Not possible."""
        return False

    def take(self, other: Bound) -> bool:
        """Of each, where they are the same tensors."""
        if not isinstance(other, _Bounds) or len(other.parts) != len(self.parts):
            return False
        pairs = zip(self.rows, other.rows, strict=True)
        if not all(np.array_equal(mine[0], theirs[0]) for mine, theirs in pairs):
            return False
        self.asked = other.asked
        return all(mine.take(theirs) for mine, theirs in zip(self.parts, other.parts, strict=True))

    def found(self) -> Sequence[Any]:
        """Of each; None for tensors of which nothing was asked."""
        out: list[Any] = [None] * len(self._whole)
        for part, (rows, _), asked in zip(self.parts, self.rows, self.asked, strict=True):
            for row, one in zip(rows.tolist(), part.found(), strict=True) if asked else ():
                out[row] = one
        return out

    def release(self) -> None:
        """Of each."""
        for part in self.parts:
            part.release()

    def check(self) -> None:
        """Of each."""
        for part in self.parts:
            part.check()


class SplitProgram(Program):
    """Runs each piece through the program of its group; programs that are ready wait for the others."""

    def __init__(self, parts: Sequence[tuple[I64, Program]], groups: int) -> None:
        """Takes (numbers of the groups, their program) pairs and how many groups there are in all."""
        self._parts = parts
        self._part = np.empty(groups, np.int64)
        self._local = np.empty(groups, np.int64)
        for n, (members, _) in enumerate(parts):
            self._part[members] = n
            self._local[members] = np.arange(len(members))

    @property
    def ready(self) -> bool:
        """True once every part is."""
        return all(p.ready for _, p in self._parts)

    def asks(self) -> Sequence[Hashable] | None:
        """What the parts ask for; None where one that is due has nothing to keep."""
        out: list[Hashable] = [None] * len(self._part)
        for members, program in self._parts:
            asked = program.asks()
            if asked is None and not program.ready:
                return None
            for g, ask in zip(members.tolist(), asked or (), strict=False):
                out[g] = ask
        return out

    def found(self) -> Sequence[Any]:
        """What the parts found; None for ops of which nothing was asked."""
        out: list[Any] = [None] * len(self._part)
        for members, program in self._parts:
            if program.asks() is not None:
                for g, one in zip(members.tolist(), program.found(), strict=True):
                    out[g] = one
        return out

    def give(self, found: Sequence[Any]) -> None:
        """To each part its own."""
        for members, program in self._parts:
            if program.asks() is not None:
                program.give([found[g] for g in members.tolist()])

    def pieces(self) -> I64 | None:
        """What the parts that are due read; None where that is everything."""
        asked = [(members, program.pieces()) for members, program in self._parts if not program.ready]
        wanted: list[I64] = []
        for members, pieces in asked:
            if pieces is None:
                return None
            moved = pieces.copy()
            moved[:, 0] = members[moved[:, 0]]
            wanted.append(moved)
        return np.concatenate(wanted)

    def bind(self, segments: Segments) -> Bound | None:
        """Each part with its own tensors; None where one cannot."""
        parts = self._cut(segments)
        made = []
        for n, rows, some in parts:
            if len(segments.nonfinite):  # these may be on a device, and then so are the part's own
                some.nonfinite = segments.nonfinite[rows]
            bound = self._parts[n][1].bind(some)
            if bound is None:
                return None
            made.append(bound)
        asked = [self._parts[n][1].asks() is not None for n, _, _ in parts]
        return _Bounds(made, [(rows, some) for _, rows, some in parts], segments, asked)

    def _cut(self, segments: Segments) -> list[tuple[int, I64, Segments]]:
        owner = self._part[segments.table[:, GROUP]]
        out = []
        for n in np.flatnonzero(np.bincount(owner)).tolist():
            rows = np.flatnonzero(owner == n)
            table = segments.table[rows]
            table[:, GROUP] = self._local[table[:, GROUP]]
            out.append((n, rows, segments.pieces(table, np.zeros(len(rows), np.int64))))
        return out

    def resident(self, segments: Segments) -> None:
        """Each part with its own tensors."""
        for n, _, some in self._cut(segments):
            self._parts[n][1].resident(some)

    def statistics(self, segments: Segments) -> list[tuple[int, Any]]:
        """Partial results of the parts that are due.

        Parts may want different things of a pass; one that wants samples while another reads everything takes
        the pieces that it is given, which are all it asked for and more.
        """
        return [
            (n, self._parts[n][1].statistics(some)) for n, _, some in self._cut(segments) if not self._parts[n][1].ready
        ]

    def advance(self, partials: Sequence[list[tuple[int, Any]]]) -> None:
        """Ends the pass of every part that is due."""
        due = [n for n, (_, p) in enumerate(self._parts) if not p.ready]
        for n in due:
            self._parts[n][1].advance([result for call in partials for m, result in call if m == n])

    def apply(self, segments: Segments) -> None:
        """Each piece through its part."""
        for n, rows, some in self._cut(segments):
            counted = len(segments.nonfinite) > 0
            if counted:  # these may be on a device, and then so are the part's own
                some.nonfinite = segments.nonfinite[rows]
            self._parts[n][1].apply(some)
            if counted:
                segments.nonfinite[rows] = some.nonfinite
