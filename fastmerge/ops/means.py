"""Sources that are means of rows of others: tokens that several models have, and rows that no token has.

Every mean is a sum in fp64, in the order of the rows, divided once and rounded once.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.dtypes import F32, F64, DType, promote
from fastmerge.ops.made import BLOCK, Rows, array, load
from fastmerge.ops.sources import Bring, workspace
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt


def _wide(sources: tuple[Source, ...]) -> DType:
    """fp32, or fp64 where a source is: no mean is rounded to the type of its rows."""
    return functools.reduce(promote, [s.dtype for s in sources], F32)


def _store(values: npt.NDArray[np.float64], address: int, dtype: DType) -> None:
    """Writes numbers to where they belong; the only rounding."""
    out = array(address, values.size, np.float64 if dtype is F64 else np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        out[:] = values


@dataclass(frozen=True, eq=False)
class Means:
    """Row ``r`` is the mean of row ``table[r, i]`` of ``sources[i]`` over all i where that is not -1.

    Attributes:
        sources: ``[R, ...]`` each, alike but for R.
        table: int64 ``[K, len(sources)]``; a row of it has at least one number.
    """

    sources: tuple[Source, ...]
    table: npt.NDArray[np.int64]

    @property
    def dtype(self) -> DType:
        """fp32, or fp64 where a source is."""
        return _wide(self.sources)

    @property
    def shape(self) -> tuple[int, ...]:
        """``[K, ...]``."""
        return (len(self.table), *self.sources[0].shape[1:])

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it takes rows of."""
        return self.sources

    @property
    def workspace(self) -> int:
        """A sum and one of its terms, as they are and as fp64, and what it takes to gather that."""
        return 32 * BLOCK + max(Rows((s,), self.table[:, 0]).workspace for s in self.sources)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """A part at a time, source by source; what a model lacks adds zeros."""
        width = math.prod(self.shape[1:])
        columns = [Rows((s,), np.ascontiguousarray(self.table[:, i])) for i, s in enumerate(self.sources)]
        counts = (self.table >= 0).sum(axis=1)
        for at in range(0, n, BLOCK):
            count = min(BLOCK, n - at)
            total = np.zeros(count)
            for rows in columns:
                total += load(bring, rows, e0 + at, count)
            total /= counts[np.arange(e0 + at, e0 + at + count) // width]
            _store(total, address + at * self.dtype.size, self.dtype)


@dataclass(frozen=True, eq=False)
class Mean:
    """One row: the mean of ``count`` rows of a source, whose others are zeros.

    Attributes:
        source: ``[R, ...]``.
        count: R, less the rows that do not count.
    """

    source: Source
    count: int

    @property
    def dtype(self) -> DType:
        """fp32, or fp64 where the source is."""
        return _wide((self.source,))

    @property
    def shape(self) -> tuple[int, ...]:
        """``[1, ...]``."""
        return (1, *self.source.shape[1:])

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it is the mean of."""
        return (self.source,)

    @property
    def workspace(self) -> int:
        """Rows as they are and as fp64, two sums, and what the source takes."""
        return 16 * max(BLOCK, self._width) + 16 * self._width + workspace(self.source)

    @property
    def _width(self) -> int:
        return math.prod(self.shape)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Reads all of the source the first time; the row is kept."""
        row = self.__dict__.get("_row")
        if row is None:
            row = np.zeros(self._width)
            rows = max(1, BLOCK // max(1, self._width))
            for first in range(0, self.source.shape[0], rows):
                some = min(rows, self.source.shape[0] - first)
                part = load(bring, self.source, first * self._width, some * self._width)
                np.add.reduce(np.concatenate([row, part], dtype=np.float64).reshape(some + 1, -1), axis=0, out=row)
            row /= self.count
            self.__dict__["_row"] = row  # two workers at a time come to the same
        _store(row[e0 : e0 + n], address, self.dtype)
