"""A set of byte ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class Ranges:
    """Disjoint, sorted, maximal ranges ``[start, stop)``; what touches is merged."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Adds a range; overlaps are fine."""
        if start >= stop:
            return
        low = bisect_left(self._stops, start)
        high = bisect_right(self._starts, stop)
        if low < high:
            start = min(start, self._starts[low])
            stop = max(stop, self._stops[high - 1])
        self._starts[low:high] = [start]
        self._stops[low:high] = [stop]

    def covers(self, start: int, stop: int) -> bool:
        """Whether every byte of a range is in the set; true of an empty range."""
        if start >= stop:
            return True
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and self._stops[at] >= stop

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a range that are not in the set."""
        gaps = []
        for first, last in zip(self._starts, self._stops, strict=True):
            if last <= start:
                continue
            if first >= stop:
                break
            if first > start:
                gaps.append((start, first))
            start = last
        if start < stop:
            gaps.append((start, stop))
        return gaps

    def common(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a range that are in the set."""
        low, high = bisect_right(self._stops, start), bisect_left(self._starts, stop)
        return [(max(a, start), min(b, stop)) for a, b in self.spans()[low:high]]

    def spans(self) -> list[tuple[int, int]]:
        """All ranges, in order."""
        return [*zip(self._starts, self._stops, strict=True)]
