"""A source of replicas that sum up to the original without any rounding: Net2Net's split, with noise."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastmerge.dtypes import BF16, F16, F64, DType
from fastmerge.ops.gathered import I64, panel_rows, panels, raw
from fastmerge.ops.made import load
from fastmerge.ops.sources import Bring, workspace
from fastmerge.ops.spec import Source
from fastmerge.philox import SPLIT, u16

if TYPE_CHECKING:
    import numpy.typing as npt

try:
    from fastmerge import _native
except ImportError:  # everything is here in numpy as well
    _native = None  # type: ignore[assignment]


class _Step(NamedTuple):
    """One peel, of rows or columns with equally many replicas to be made.

    Attributes:
        number: of the replica that is made.
        left: how many are to be made, with that one.
        old: the originals, ascending.
        to: where the replicas are.
    """

    number: int
    left: int
    old: I64
    to: slice | I64


@dataclass(frozen=True, eq=False)
class Split:
    r"""Replicas of rows or columns whose sum is the original, without any rounding.

    Of an element ``w`` with n replicas left, ``s`` in (0, 2 / n) is drawn for each, by ``(key, step, element)``. The
    larger of ``s`` and ``1 - s``, at least 1 / 2, times ``w`` is ``d``, in the source's type; as
    ``|w| / 2 <= |d| <= |w|``, ``w - d`` has no rounding (Sterbenz). The replica gets that of the two which is about
    ``s w``, and the rest goes to the others.

    Attributes:
        source: ``[R, C]``.
        index: int64 ``[K]``: of which original each is a replica; every original has one or more.
        key: 64-bit Philox key.
        axis: 1, columns are split; 0, rows.
        even: halves in place of what is drawn (and halves of halves, where there are more than two).
    """

    source: Source
    index: I64
    key: int
    axis: int = 1
    even: bool = False

    @property
    def dtype(self) -> DType:
        """That of the source."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """``[R, K]``, or ``[K, C]``."""
        rows, columns = self.source.shape
        return (rows, len(self.index)) if self.axis else (len(self.index), columns)

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it splits."""
        return (self.source,)

    @property
    def workspace(self) -> int:
        """Some ten panels of numbers on their way, and the index in several orders."""
        width = self.source.shape[1] + self.shape[1]
        return 64 * panel_rows(width) * width + 128 * sum(self.shape) + workspace(self.source)

    @functools.cached_property
    def _steps(self) -> tuple[list[_Step], I64, slice | I64]:
        """The peels; the number of each replica; the place of each original's last replica."""
        number = np.empty(len(self.index), np.int64)
        order = np.argsort(self.index, kind="stable")
        counts = np.bincount(self.index, minlength=self.source.shape[self.axis])
        starts = np.cumsum(counts) - counts
        number[order] = np.arange(len(order)) - starts[self.index[order]]
        steps = []
        for k in range(int(counts.max(initial=1)) - 1):
            for n in np.unique(counts[counts > k + 1]).tolist():
                old = np.flatnonzero(counts == n)
                steps.append(_Step(k, n - k, old, _slice(order[starts[old] + k])))
        return steps, number, _slice(order[starts + counts - 1])

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Whole rows at a time."""
        columns = self.source.shape[1]
        for rows, panel in panels(self.shape, e0, n, address, raw(self.dtype), columns):
            if self.axis:
                rest = load(bring, self.source, rows.start * columns, len(rows) * columns)
                self._split_columns(rest.reshape(len(rows), columns), rows, panel)
                continue
            rest = np.empty((len(rows), columns), np.float64 if self.dtype is F64 else np.float32)
            for at, old, length in _neighbours(self.index[rows.start : rows.stop]):
                part = load(bring, self.source, old * columns, length * columns)
                rest[at : at + length] = part.reshape(length, columns)
            self._split_rows(rest, rows)
            _narrow(rest, self.dtype, panel, slice(None))

    def _split_columns(self, rest: npt.NDArray[Any], rows: range, panel: npt.NDArray[Any]) -> None:
        steps, _, last = self._steps
        for i, (_, left, old, to) in enumerate(steps):
            every = len(old) == rest.shape[1]
            x = rest if every else np.take(rest, old, axis=1)
            drawn = None if self.even else _drawn(self.key, i, rows.start * len(old), x.size)
            _narrow(_peel(x, drawn, left, self.dtype), self.dtype, panel, to)
            if not every:
                rest[:, old] = x
        _narrow(rest, self.dtype, panel, last)

    def _split_rows(self, rest: npt.NDArray[Any], rows: range) -> None:
        """Every row is peeled as often as its replicas before it were, and then gets its own part."""
        steps, number, _ = self._steps
        mine, numbers = self.index[rows.start : rows.stop], number[rows.start : rows.stop]
        width = rest.shape[1]
        for i, (k, left, old, _) in enumerate(steps):
            at = np.flatnonzero((numbers >= k) & np.isin(mine, old))
            if not len(at):
                continue
            x, drawn = rest[at], None
            if not self.even:
                runs = _neighbours(np.searchsorted(old, mine[at]))
                drawn = np.concatenate([_drawn(self.key, i, of * width, n * width) for _, of, n in runs])
            replica = _peel(x, drawn, left, self.dtype)
            rest[at] = np.where((numbers[at] == k)[:, None], replica, x)


def _neighbours(index: I64) -> list[tuple[int, int, int]]:
    """Runs of an index that count up: place, first value, length."""
    heads = np.concatenate([[0], np.flatnonzero(np.diff(index) != 1) + 1])
    lengths = np.diff(np.append(heads, len(index)))
    return list(zip(heads.tolist(), index[heads].tolist(), lengths.tolist(), strict=True))


def _slice(index: I64) -> slice | I64:
    """An index as a slice, which numpy is several times faster with, if it counts up in equal steps."""
    if len(index) < 2:
        return index
    step = int(index[1] - index[0])
    if step < 1 or (np.diff(index) != step).any():
        return index
    return slice(int(index[0]), int(index[-1]) + 1, step)


def _drawn(key: int, step: int, e0: int, n: int) -> npt.NDArray[np.int8]:
    """One random byte each for elements ``e0 .. e0 + n``: half of the 16 bits of element ``e / 2``, low half first."""
    first, last = e0 >> 1, (e0 + n + 1) >> 1
    draw = u16 if _native is None else _native.philox_u16
    return draw(key, step, SPLIT, first, last - first).astype("<u2", copy=False).view(np.int8)[e0 & 1 :][:n]


def _peel(x: npt.NDArray[Any], drawn: npt.NDArray[np.int8] | None, left: int, dtype: DType) -> npt.NDArray[Any]:
    """A replica of each number, of which the rest stays in ``x``; infinities, and what is no number, stay and are it.

    Args:
        x: fp32, or fp64, contiguous.
        drawn: of each, contiguous; None for halves.
        left: how many replicas are to be made, with this one.
        dtype: that holds the numbers, and shall hold their parts.
    """
    share = 2.0 / (256 * left)
    if _native is not None and drawn is not None:
        replica = np.empty_like(x)
        _native.peel(x.ctypes.data, replica.ctypes.data, drawn.ctypes.data, share, x.size, dtype.code)
        return replica
    kind = x.dtype.type
    half = np.zeros(1, x.dtype) + kind(0.5)
    s = half if drawn is None else (drawn.reshape(x.shape) + kind(128.5)).astype(x.dtype) * kind(share)
    small = s < kind(0.5)
    with np.errstate(invalid="ignore"):
        part = _part(np.where(small, kind(1) - s, s) * x, dtype)
        rest = x - part
    finite = np.isfinite(x)
    replica = np.where(finite, np.where(small, rest, part), x)
    np.copyto(x, np.where(small, part, rest), where=finite)
    return replica


def _part(x: npt.NDArray[Any], dtype: DType) -> npt.NDArray[Any]:
    """Numbers in a type, as fp32: bf16 towards zero, which keeps ``x / 2 .. x`` as well."""
    if dtype is BF16:
        return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return x.astype(np.float16).astype(np.float32) if dtype is F16 else x


def _narrow(x: npt.NDArray[Any], dtype: DType, panel: npt.NDArray[Any], to: slice | I64) -> None:
    """Writes numbers that a type holds exactly to columns of a panel of its bits."""
    if dtype is BF16:
        panel[:, to] = x.view(np.uint16).reshape(*x.shape, 2)[..., int(sys.byteorder == "little")]
    else:
        panel[:, to] = (x.astype(np.float16) if dtype is F16 else x).view(panel.dtype)
