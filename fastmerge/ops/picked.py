"""Sources that slices are made of: rows and columns by index, norms with another gain, tensors that were computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from fastmerge.dtypes import F32, F64, DType
from fastmerge.ops.made import BLOCK, NEAR, array, load
from fastmerge.ops.sources import Bring, workspace
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt

Index: TypeAlias = "npt.NDArray[np.int64]"

_BITS: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, eq=False)
class Picked:
    """Some rows and columns of a source, in any order: ``out[r, c] = source[rows[r], columns[c]]``, byte for byte.

    Attributes:
        source: ``[..., I]``; its leading dimensions count as rows, of which a vector has one.
        rows: int64 ``[R]``; None for all.
        columns: int64 ``[C]``; None for all.
        shape: of the result, with R C elements.
    """

    source: Source
    rows: Index | None
    columns: Index | None
    shape: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        """That of the source."""
        return self.source.dtype

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it takes from."""
        return (self.source,)

    @property
    def _width(self) -> int:
        return self.source.shape[-1] if self.columns is None else len(self.columns)

    @property
    def _panel(self) -> int:
        """Rows that are brought at a time, where columns are picked."""
        return max(1, BLOCK // max(1, self.source.shape[-1]))

    @property
    def workspace(self) -> int:
        """A panel of rows as they are and picked; the table of what is read; what the source takes."""
        return 16 * max(BLOCK, self.source.shape[-1]) + 72 * (self._rows + 1) + workspace(self.source)

    @property
    def _rows(self) -> int:
        return math.prod(self.source.shape[:-1]) if self.rows is None else len(self.rows)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Whole rows come straight to their place; of others those columns are read that lie around the wanted ones."""
        width = self._width
        if not n or not width:
            return
        first, last = e0 // width, (e0 + n - 1) // width + 1
        if self.columns is None:
            begin = np.maximum(np.arange(first, last) * width, e0)
            length = np.minimum(np.arange(first + 1, last + 1) * width, e0 + n) - begin
            start = self._of(first, last) * width + begin - np.arange(first, last) * width
            _bring(bring, self.source, start, length, address + (begin - e0) * self.dtype.size)
            return
        low, span = int(self.columns.min()), int(np.ptp(self.columns)) + 1
        inner = self.source.shape[-1]
        if (inner - span) * self.dtype.size < NEAR:
            low, span = 0, inner
        columns, bits = self.columns - low, _BITS[self.dtype.size]
        out = array(address, n, bits)
        for row in range(first, last, self._panel):
            count = min(self._panel, last - row)
            raw = np.empty((count, span), bits)
            start, to = self._of(row, row + count) * inner + low, np.arange(count) * span * self.dtype.size
            _bring(bring, self.source, start, np.full(count, span), raw.ctypes.data + to)
            picked = raw.take(columns, axis=1).reshape(-1)
            head, tail = max(e0, row * width), min(e0 + n, (row + count) * width)
            out[head - e0 : tail - e0] = picked[head - row * width : tail - row * width]

    def _of(self, first: int, last: int) -> Index:
        return np.arange(first, last) if self.rows is None else self.rows[first:last]


def _bring(bring: Bring, source: Source, start: Index, length: Index, to: Index) -> None:
    """Brings runs of a source, those together that follow each other there and here."""
    size = source.dtype.size
    ends = np.flatnonzero((start[1:] != start[:-1] + length[:-1]) | (to[1:] != to[:-1] + length[:-1] * size))
    heads = np.concatenate([[0], ends + 1])
    bring(source, np.stack([start[heads], np.add.reduceat(length, heads), to[heads]], axis=1))


@dataclass(frozen=True)
class Gain:
    """A norm's weights of which each gain is ``factor`` times what it was, in fp64: to be rounded once.

    Attributes:
        source: ``[D]``.
        factor: of the gains.
        plus_one: gains are one plus the weight (Gemma).
    """

    source: Source
    factor: float
    plus_one: bool

    dtype: ClassVar[DType] = F64

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    @property
    def inputs(self) -> tuple[Source, ...]:
        """The weights."""
        return (self.source,)

    @property
    def workspace(self) -> int:
        """The run as it is stored, and as fp64 twice."""
        return 32 * math.prod(self.shape) + workspace(self.source)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """One product for each weight."""
        gains = load(bring, self.source, e0, n).astype(np.float64) + float(self.plus_one)
        array(address, n, np.float64)[:] = gains * self.factor - float(self.plus_one)


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that was computed: it lives as long as the plan.

    Attributes:
        values: fp32, contiguous.
    """

    values: npt.NDArray[np.float32]

    dtype: ClassVar[DType] = F32
    inputs: ClassVar[tuple[Source, ...]] = ()
    workspace: ClassVar[int] = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values."""
        return self.values.shape

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Copies the run."""
        array(address, n, np.float32)[:] = self.values.reshape(-1)[e0 : e0 + n]
