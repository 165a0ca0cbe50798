"""Sources that lay others out anew: end to end, and with rows for columns. Fused experts are made of them.

==============  ==========================================================
``Joined``      sources one after the other, in a shape of their own
``Transposed``  matrices with rows for columns
==============  ==========================================================

No value is computed, so no bit changes; :class:`fastmerge.ops.gathered.Part` is the way back from ``Joined``.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.dtypes import DType, promote
from fastmerge.ops.made import array, brought
from fastmerge.ops.sources import Bring, workspace
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt

PANEL = 1 << 19
"""Elements that are turned, or widened, at a time; one row of the result at least."""


@dataclass(frozen=True, eq=False)
class Joined:
    """The elements of several sources, one source after the other.

    Attributes:
        sources: of any shapes, one at least.
        shape: of the result, with as many elements as the sources have together.
    """

    sources: tuple[Source, ...]
    shape: tuple[int, ...]

    @functools.cached_property
    def dtype(self) -> DType:
        """That which all sources go into."""
        return functools.reduce(promote, {s.dtype for s in self.sources})

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it joins."""
        return self.sources

    @functools.cached_property
    def workspace(self) -> int:
        """A panel as it is stored and widened, where a source is of another type; what the sources take."""
        widened = any(s.dtype is not self.dtype for s in self.sources)
        return 24 * PANEL * widened + max(map(workspace, self.sources))

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(math.prod(s.shape) for s in self.sources)]

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Each source brings its part of the run straight to its place."""
        at, end = e0, e0 + n
        while at < end:
            i = bisect_right(self._starts, at) - 1
            source, start = self.sources[i], self._starts[i]
            count, to = min(self._starts[i + 1], end) - at, address + (at - e0) * self.dtype.size
            if source.dtype is self.dtype:
                bring(source, np.array([[at - start, count, to]], np.int64))
            else:
                count = min(count, PANEL)
                wide = brought(bring, source, at - start, count, self.dtype)
                array(to, wide.size, np.uint8)[:] = wide
            at += count


@dataclass(frozen=True, eq=False)
class Transposed:
    """Matrices of a source the other way round: ``[..., C, R]`` of ``[..., R, C]``."""

    source: Source

    @property
    def dtype(self) -> DType:
        """That of the source."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The last two dimensions change places."""
        *lead, rows, columns = self.source.shape
        return (*lead, columns, rows)

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it turns."""
        return (self.source,)

    @property
    def workspace(self) -> int:
        """A panel, and the table of its rows."""
        rows, columns = self.source.shape[-2:]
        return self.dtype.size * max(PANEL, columns) + 48 * min(PANEL, rows) + workspace(self.source)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Of a panel of the source's rows at a time the columns that the run touches."""
        height, width = self.source.shape[-2:]
        kind = np.dtype(f"u{self.dtype.size}")
        out = array(address, n, kind)
        for matrix, begin, end in matrices(height * width, e0, n):
            mine = out[matrix * height * width + begin - e0 :][: end - begin]
            first, last = begin // height, (end - 1) // height + 1
            count, skip = last - first, begin - first * height
            for top in range(0, height, step := max(1, PANEL // count)):
                rows = np.arange(top, min(top + step, height), dtype=np.int64)
                part = np.empty((len(rows), count), kind)
                table = np.empty((len(rows), 3), np.int64)
                table[:, 0] = (matrix * height + rows) * width + first
                table[:, 1] = count
                table[:, 2] = part.ctypes.data + part.strides[0] * np.arange(len(rows))
                bring(self.source, table)
                scatter(part, mine, skip, top, height)


def matrices(size: int, e0: int, n: int) -> Iterator[tuple[int, int, int]]:
    """The matrices that a run touches, each with the first and the last (exclusive) of its elements."""
    for matrix in range(e0 // size, (e0 + n - 1) // size + 1) if n else ():
        yield matrix, max(e0 - matrix * size, 0), min(e0 + n - matrix * size, size)


def scatter(part: npt.NDArray[Any], out: npt.NDArray[Any], skip: int, top: int, height: int) -> None:
    """Writes ``part [k, count]`` as columns ``top ..`` of rows of ``height``, of which ``out`` lacks ``skip``."""
    k, count = part.shape
    first, last = -(-skip // height), (skip + out.size) // height
    if last > first:
        whole = out[first * height - skip : last * height - skip].reshape(last - first, height)
        whole[:, top : top + k] = part[:, first:last].T
    for row in {0, count - 1} - set(range(first, last)):
        begin, end = max(row * height + top, skip), min(row * height + top + k, skip + out.size)
        if begin < end:
            out[begin - skip : end - skip] = part[begin - row * height - top : end - row * height - top, row]
