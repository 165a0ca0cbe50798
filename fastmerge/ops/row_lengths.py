"""Sources whose rows, or columns, are given lengths: the last step of DoRA."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.dtypes import F64, DType
from fastmerge.ops.made import PANEL, array, load
from fastmerge.ops.sources import Bring, workspace
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt

LANES = 2048
"""Sums of a row that run side by side."""


def squares(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Sums of the squares of rows, ``[K, I] -> [K]``: lane j adds elements j, j + 2048, ...; lanes fold by halves.

    In fp64 throughout; every operation is elementwise, so that the result is the same everywhere.
    """
    lanes = np.zeros((len(rows), LANES))
    for at in range(0, rows.shape[1], LANES):
        part = rows[:, at : at + LANES].astype(np.float64)
        lanes[:, : part.shape[1]] += part * part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


@dataclass(frozen=True, eq=False)
class _Lengths:
    """A matrix, and the lengths that its rows or columns are given."""

    source: Source
    magnitude: Source

    @property
    def dtype(self) -> DType:
        """That of the source."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    @property
    def inputs(self) -> tuple[Source, ...]:
        """Both."""
        return (self.source, self.magnitude)


@dataclass(frozen=True, eq=False)
class RowLengths(_Lengths):
    """``v_o m_o / ||v_o||`` for each row ``v_o``: the factor is rounded once, and so is each product.

    Any run of elements takes the whole rows that it touches.

    Attributes:
        source: ``[O, I]``, fp32 or fp64.
        magnitude: ``[O]``.
    """

    @property
    def workspace(self) -> int:
        """A panel of rows, at least one, and its lanes; all magnitudes."""
        rows = max(1, PANEL // self.shape[1])
        return 16 * max(PANEL, self.shape[1]) + 48 * LANES * rows + 16 * self.shape[0] + workspace(self.source)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """A panel of whole rows at a time."""
        if not n:
            return
        work = np.float64 if self.dtype is F64 else np.float32
        out, width = array(address, n, work), self.shape[1]
        first, last, step = e0 // width, (e0 + n - 1) // width + 1, max(1, PANEL // width)
        lengths = load(bring, self.magnitude, first, last - first).astype(np.float64)
        for row in range(first, last, step):
            count = min(step, last - row)
            panel = load(bring, self.source, row * width, count * width).reshape(count, width)
            with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros has no direction: NaN, as in peft
                factor = (lengths[row - first : row - first + count] / np.sqrt(squares(panel))).astype(work)
                np.multiply(panel, factor[:, None], panel)
            begin, end = max(e0, row * width), min(e0 + n, (row + count) * width)
            out[begin - e0 : end - e0] = panel.reshape(-1)[begin - row * width : end - row * width]


@dataclass(frozen=True, eq=False)
class ColumnLengths(_Lengths):
    """``v_o m_o / ||v_o||`` for each column ``v_o``, of a weight that is stored ``[in, out]``.

    The lengths take the whole tensor: whatever run is wanted first makes it once for them, and they are kept.

    Attributes:
        source: ``[I, O]``, fp32 or fp64.
        magnitude: ``[O]``.
    """

    @property
    def workspace(self) -> int:
        """A panel of rows, at least one, and some numbers for each column."""
        return 24 * max(PANEL, self.shape[1]) + 48 * self.shape[1] + workspace(self.source)

    @functools.cached_property
    def _kept(self) -> list[npt.NDArray[Any]]:
        """The factors, once they are known."""
        return []

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """A panel of the run at a time."""
        if not n:
            return
        if not self._kept:
            self._kept.append(self._factors(bring))
        factors, width = self._kept[0], self.shape[1]
        out = array(address, n, factors.dtype)
        for at in range(0, n, PANEL):
            part = out[at : at + PANEL]
            bring(self.source, np.array([[e0 + at, part.size, part.ctypes.data]], np.int64))
            np.multiply(part, factors[np.arange(e0 + at, e0 + at + part.size) % width], part)

    def _factors(self, bring: Bring) -> npt.NDArray[Any]:
        """``m_o / ||v_o||``, rounded once; squares are summed in fp64, row after row."""
        rows, width = self.shape
        sums = np.zeros(width)
        step = max(1, PANEL // width)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            panel = load(bring, self.source, row * width, count * width).reshape(count, width).astype(np.float64)
            for one in np.multiply(panel, panel, panel):
                sums += one
        with np.errstate(divide="ignore", invalid="ignore"):  # as for rows
            found = load(bring, self.magnitude, 0, width).astype(np.float64) / np.sqrt(sums)
        return found.astype(np.float64 if self.dtype is F64 else np.float32)
