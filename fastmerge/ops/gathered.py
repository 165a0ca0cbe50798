"""Sources that gather columns of others and scale them: with ``Rows``, what growing and slicing are made of.

===========  ========================================================
``Part``     a run of another source (a matrix of a fused tensor)
``Columns``  columns of sources side by side, in any order, with gaps
``Scaled``   rows or columns times a factor each
===========  ========================================================

They work on whole rows, a panel at a time. :mod:`fastmerge.ops.replicas` has one more, that splits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from fastmerge.dtypes import F32, F64, DType, promote
from fastmerge.ops.made import array, brought, load
from fastmerge.ops.sources import Bring, workspace
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt

PANEL = 1 << 18
"""Elements of a result that are computed at a time, and one row at least: they stay in the cache."""

RUNS = 64
"""Runs of neighbouring columns up to which each is copied by itself; beyond, numpy gathers single elements."""

I64: TypeAlias = "npt.NDArray[np.int64]"


@dataclass(frozen=True, eq=False)
class Part:
    """Elements ``first .. first + numel`` of a source, in a shape of their own.

    Attributes:
        source: of any shape.
        first: logical index there.
        shape: of the part.
    """

    source: Source
    first: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        """That of the source."""
        return self.source.dtype

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it is a part of."""
        return (self.source,)

    @property
    def workspace(self) -> int:
        """What the source takes."""
        return workspace(self.source)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """The same run, further on."""
        bring(self.source, np.array([[self.first + e0, n, address]], np.int64))


class _Run(NamedTuple):
    """Neighbouring columns: from ``old`` on in source ``source`` (-1: zeros) to ``new`` on."""

    new: int
    source: int
    old: int
    length: int


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of other sources: column ``j`` is column ``index[j]`` of ``sources``, side by side; -1 gives zeros.

    Attributes:
        sources: ``[R, C]`` each, alike but for C.
        index: int64 ``[K]``, -1 .. sum of C - 1.
    """

    sources: tuple[Source, ...]
    index: I64

    @property
    def dtype(self) -> DType:
        """That which all sources go into."""
        return functools.reduce(promote, [s.dtype for s in self.sources])

    @property
    def shape(self) -> tuple[int, ...]:
        """``[R, K]``."""
        return (self.sources[0].shape[0], len(self.index))

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it takes columns of."""
        return self.sources

    @property
    def workspace(self) -> int:
        """A panel of rows of all sources as they are and widened, and of the result; numpy's indices."""
        width = sum(s.shape[1] for s in self.sources) + len(self.index)
        return 16 * panel_rows(width) * width + 64 * width + max(map(workspace, self.sources))

    @functools.cached_property
    def _runs(self) -> list[_Run]:
        """Of the index, by source."""
        ends = np.cumsum([0] + [s.shape[1] for s in self.sources])
        of = np.searchsorted(ends, self.index, side="right") - 1
        step = (np.diff(self.index) != np.where(self.index[1:] < 0, 0, 1)) | (np.diff(of) != 0)
        heads = np.concatenate([[0], np.flatnonzero(step) + 1]) if len(self.index) else np.zeros(0, np.int64)
        lengths = np.diff(np.append(heads, len(self.index)))
        return [
            _Run(new, int(of[new]), int(self.index[new] - ends[max(of[new], 0)]), length)
            for new, length in zip(heads.tolist(), lengths.tolist(), strict=True)
        ]

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Whole rows of the sources are brought, and their columns put in order."""
        kind = raw(self.dtype)
        for rows, panel in panels(self.shape, e0, n, address, kind, sum(s.shape[1] for s in self.sources)):
            parts = [
                brought(bring, s, rows.start * s.shape[1], len(rows) * s.shape[1], self.dtype).view(kind)
                for s in self.sources
            ]
            parts = [part.reshape(len(rows), -1) for part in parts]
            if len(self._runs) > RUNS:
                self._gather(parts, panel)
                continue
            for new, of, old, length in self._runs:
                panel[:, new : new + length] = parts[of][:, old : old + length] if of >= 0 else 0

    def _gather(self, parts: list[npt.NDArray[Any]], panel: npt.NDArray[Any]) -> None:
        """Element by element, one source after the other."""
        above = 0
        for source, part in zip(self.sources, parts, strict=True):
            mine = np.flatnonzero((self.index >= above) & (self.index < above + source.shape[1]))
            if len(mine) == panel.shape[1]:
                np.take(part, self.index - above, axis=1, out=panel, mode="clip")
            elif len(mine):
                panel[:, mine] = part[:, self.index[mine] - above]
            above += source.shape[1]
        panel[:, self.index < 0] = 0


@dataclass(frozen=True, eq=False)
class Scaled:
    """``f_i x``, or ``(1 + x) f_i - 1`` for norms that add one: fp32 (fp64 for fp64), every operation rounded once.

    Attributes:
        source: ``[R, C]`` or ``[R]``.
        factors: fp64 ``[R]`` or ``[C]``.
        axis: which of the two they count.
        plus_one: computed in fp64 throughout.
    """

    source: Source
    factors: npt.NDArray[np.float64]
    axis: int = 0
    plus_one: bool = False

    @property
    def dtype(self) -> DType:
        """fp32, or fp64: nothing is rounded to the source's type."""
        return F64 if self.source.dtype is F64 else F32

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it scales."""
        return (self.source,)

    @property
    def workspace(self) -> int:
        """A panel as it is and in fp64, and factors as they are used."""
        width = math.prod(self.shape[1:])
        return 32 * panel_rows(width) * width + 8 * len(self.factors) + workspace(self.source)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Whole rows at a time."""
        kind: type[np.floating[Any]] = np.float64 if self.dtype is F64 else np.float32
        width = math.prod(self.shape[1:])
        for rows, panel in panels((self.shape[0], width), e0, n, address, kind, 0):
            x = load(bring, self.source, rows.start * width, len(rows) * width).reshape(panel.shape)
            factors = self.factors if self.axis else self.factors[rows.start : rows.stop, None]
            if self.plus_one:
                panel[:] = (1.0 + x.astype(np.float64)) * factors - 1.0
            else:
                np.multiply(x, factors.astype(kind), panel)


def panel_rows(width: int) -> int:
    """Rows of a panel."""
    return max(1, PANEL // max(1, width))


def panels(
    shape: tuple[int, ...], e0: int, n: int, address: int, kind: npt.DTypeLike, beside: int
) -> Iterator[tuple[range, npt.NDArray[Any]]]:
    """The whole rows that a run touches, a panel at a time, with memory to put each in: where the run is, if it can.

    Args:
        shape: ``[R, C]``.
        e0: first element of the run.
        n: elements of the run.
        address: of the run.
        kind: of its elements.
        beside: columns of what is computed beside the panel.
    """
    width = shape[1]
    if not n or not width:
        return
    out = array(address, n, kind)
    last, step = -(-(e0 + n) // width), panel_rows(width + beside)
    at = e0 // width
    while at < last:
        end = min(at + step, last)
        begin, stop = max(e0, at * width), min(e0 + n, end * width)
        part = out[begin - e0 : stop - e0]
        if part.size == (end - at) * width:
            yield range(at, end), part.reshape(-1, width)
        else:
            panel = np.empty((end - at, width), out.dtype)
            yield range(at, end), panel
            part[:] = panel.reshape(-1)[begin - at * width : stop - at * width]
        at = end


def raw(dtype: DType) -> npt.DTypeLike:
    """Unsigned integers of the size of a type."""
    return np.dtype(f"u{dtype.size}")
