"""Sources that lay others out anew: end to end, and with rows for columns. Fused experts are made of them.

==============  ==========================================================
``Joined``      sources one after the other, in a shape of their own
``Transposed``  a matrix with rows for columns
==============  ==========================================================

No value is computed, so no bit changes; :class:`fastmerge.ops.gathered.Part` is the way back from ``Joined``.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from fastmerge.dtypes import DType, promote
from fastmerge.ops.gathered import raw
from fastmerge.ops.made import array, brought
from fastmerge.ops.sources import Bring, workspace
from fastmerge.ops.spec import Source

PANEL = 1 << 20
"""Elements that are turned, or widened, at a time; one column of a matrix at least."""


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
    """``out[i, j] = source[j, i]``.

    Attributes:
        source: ``[R, C]``.
    """

    source: Source

    @property
    def dtype(self) -> DType:
        """That of the source."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """``[C, R]``."""
        return self.source.shape[::-1]

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it turns."""
        return (self.source,)

    @property
    def _columns(self) -> int:
        """Columns of the source that are turned at a time."""
        return max(1, PANEL // max(1, self.source.shape[0]))

    @property
    def workspace(self) -> int:
        """A panel as it is and turned, and the table of what is read; what the source takes."""
        rows = self.source.shape[0]
        return 2 * self.dtype.size * rows * self._columns + 48 * rows + workspace(self.source)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Of every row of the source the columns that the run needs are read, a panel at a time."""
        rows, width = self.source.shape
        if not n:
            return
        kind, size = raw(self.dtype), self.dtype.size
        out = array(address, n, kind)
        last = -(-(e0 + n) // rows)
        for first in range(e0 // rows, last, self._columns):
            count = min(self._columns, last - first)
            panel = np.empty((rows, count), kind)
            each = np.arange(rows, dtype=np.int64)
            starts, to = each * width + first, panel.ctypes.data + each * count * size
            runs = np.stack([starts, np.full(rows, count), to], axis=1)
            if count == width:
                runs = np.array([[0, rows * width, panel.ctypes.data]], np.int64)
            bring(self.source, runs)
            turned = panel.T.reshape(-1)
            head, tail = max(e0, first * rows), min(e0 + n, (first + count) * rows)
            out[head - e0 : tail - e0] = turned[head - first * rows : tail - first * rows]
