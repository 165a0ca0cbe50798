"""Drop-Upcycling: experts of which some inner units are drawn anew.

Expert ``e`` of family replicate, but that elements of the units U_e are normal numbers with the mean and the standard
deviation of those that they replace (the population's; sums in the order of design law L2, over the whole tensor, with
zeros in place of elements of other units)::

    out_e[i] = round(W(mean_e) + W(deviation_e) * n)      n = normal(key, e, NOISE, i), i in a unit of U_e

U_e are the ``round(ratio * units)`` units with the smallest 32-bit random numbers (the earlier of equal ones); gate, up
and down of one expert agree on them where they have one key for the choice. A unit is a row, or a column.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastmerge.dtypes import BY_NAME, F32, DType
from fastmerge.errors import OutputError
from fastmerge.ops.elementwise import convert
from fastmerge.ops.kernels import Kernels
from fastmerge.ops.program import Program
from fastmerge.ops.replicate import alone
from fastmerge.ops.segments import E0, F64, GROUP, HEADER, I64, KEY, LENGTH, OUT, TILE, Segments
from fastmerge.ops.spec import Op, Spec
from fastmerge.ops.tiles import Partial, gather, number
from fastmerge.philox import UNITS, u16

if TYPE_CHECKING:
    import numpy.typing as npt

    Mask = npt.NDArray[np.bool_]


class Units(NamedTuple):
    """Which units of which experts are drawn anew.

    Attributes:
        key: 64-bit Philox key of the choice.
        by_row: a unit is a row of the tensor; else a column.
        ratios: share of each expert's.
    """

    key: int
    by_row: bool
    ratios: tuple[float, ...]


@functools.lru_cache(maxsize=256)
def chosen(key: int, expert: int, units: int, ratio: float) -> Mask:
    """``[units]`` which are drawn anew: U_e."""
    numbers = u16(key, expert, UNITS, 0, 2 * units).astype("<u2").view("<u4")
    found = np.zeros(units, np.bool_)
    found[np.argsort(numbers, kind="stable")[: int(ratio * units + 0.5)]] = True
    return found


def drawn(units: Units, experts: Sequence[int], spec: Spec, e0: int, n: int) -> list[Mask | None]:
    """Which elements of a run are drawn anew, for each expert; None: none of the tensor."""
    rows, columns = spec.shape
    i = np.arange(e0, e0 + n)
    where = i // columns if units.by_row else i % columns
    count = rows if units.by_row else columns
    return [
        chosen(units.key, e, count, r)[where] if int(r * count + 0.5) else None
        for e, r in zip(experts, units.ratios, strict=True)
    ]


def solve(op: Op, units: Units, stats: F64) -> tuple[F64, F64]:
    """Means and standard deviations of what each expert replaces, from sums ``[E, 2]`` of squares and of values."""
    if not np.isfinite(stats).all():
        raise OutputError(f"{op.name}: what is drawn anew needs a mean and a deviation, and an input holds NaN or Inf")
    count, other = op.spec.shape if units.by_row else op.spec.shape[::-1]
    size = np.array([max(1, int(r * count + 0.5) * other) for r in units.ratios], np.float64)
    means = stats[:, 1] / size
    return means, np.sqrt(np.maximum(stats[:, 0] / size - means * means, 0.0))


class RedrawProgram(Program):
    """One pass of sums, then noise and what is drawn anew, a tile at a time."""

    def __init__(
        self, kernels: Kernels, ops: Sequence[Op], units: Sequence[Units], experts: Sequence[int], before: Program
    ) -> None:
        """Takes the backend, the ops with their units, the experts' numbers, and what makes the rest of the result."""
        self._kernels = kernels
        self._ops = ops
        self._units = units
        self._experts = experts
        self._before = before
        self._found: list[tuple[F64, F64]] | None = None

    @property
    def ready(self) -> bool:
        """Once means and deviations are known."""
        return self._found is not None

    def pieces(self) -> I64 | None:
        """Everything."""
        return None

    def _tiles(self, row: I64) -> Iterator[tuple[int, int, list[Mask | None]]]:
        """(first element of a piece, elements, what is drawn anew) of its tiles."""
        op, units = self._ops[row[GROUP]], self._units[row[GROUP]]
        for at in range(0, int(row[LENGTH]), TILE):
            n = min(TILE, int(row[LENGTH]) - at)
            yield at, n, drawn(units, self._experts, op.spec, int(row[E0]) + at, n)

    def statistics(self, segments: Segments) -> Partial:
        """Sums of every tile; of every expert those of squares and of values, and what goes before has its own."""
        numbered, spans, tiles = number(alone(segments))
        values = np.zeros((tiles, len(self._experts), 2))
        wide, work = _wide(segments.dtypes[0])
        space, ones = np.empty((len(self._experts) + 1, TILE), work), np.ones(TILE, work)
        tile = 0
        for row in numbered.table:
            for at, n, masks in self._tiles(row):
                x = space[-1]
                address = int(row[HEADER]) + at * segments.dtypes[0].size
                convert(self._kernels, segments.dtypes[0], wide, [address], [x.ctypes.data], n)
                some = [e for e, mask in enumerate(masks) if mask is not None]
                rows = []
                for i, e in enumerate(some):
                    np.copyto(space[i, :n], 0)
                    np.copyto(space[i, :n], x[:n], where=masks[e])
                    rows.append([0, n, 0, n, 0, 0, i, space[i].ctypes.data, ones.ctypes.data])
                sums = np.empty((len(some), 3))
                table = Segments(np.array(rows, np.int64).reshape(-1, HEADER + 2), (wide, wide), wide)
                self._kernels.gram(table, sums, delta=False, diff=False, per_row=False)
                values[tile, some] = sums[:, :2]
                tile += 1
        return Partial(spans, values, None if self._before.ready else self._before.statistics(segments))

    def advance(self, partials: Sequence[Partial]) -> None:
        """Adds tiles in order."""
        if not self._before.ready:
            self._before.advance([p.extra for p in partials])
        tiles = np.array([-(-op.spec.numel // TILE) for op in self._ops], np.int64)
        ordered = np.ascontiguousarray(gather(partials, tiles).reshape(int(tiles.sum()), -1))
        sums = self._kernels.fold(ordered, np.concatenate([[0], np.cumsum(tiles)]))
        stats = sums.reshape(len(self._ops), -1, 2)
        self._found = [solve(*each) for each in zip(self._ops, self._units, stats, strict=True)]

    def apply(self, segments: Segments) -> None:
        """The noise, then what is drawn anew over it."""
        if self._found is None:
            raise AssertionError("apply before the statistics are complete")
        self._before.apply(segments)
        wide, work = _wide(segments.dtypes[0])
        size = segments.out_dtype.size
        unsigned: Any = np.dtype(f"u{size}")
        mean, made = np.empty(TILE, work), np.empty(TILE, unsigned)
        for row in segments.table:
            means, deviations = self._found[row[GROUP]]
            outs = [int(row[OUT]), *row[HEADER + len(segments.dtypes) :].tolist()]
            for at, n, masks in self._tiles(row):
                for e, mask in enumerate(masks):
                    if mask is None:
                        continue
                    mean[:n] = means[e]
                    where = [made.ctypes.data, n, int(row[E0]) + at, n, int(row[KEY]), 0, 0, mean.ctypes.data]
                    table = Segments(np.array([where], np.int64), (wide,), segments.out_dtype)
                    self._kernels.replicate(table, deviations[e : e + 1, None], np.array(self._experts[e : e + 1]))
                    np.copyto(_memory(outs[e] + at * size, n, unsigned), made[:n], where=mask)


def _wide(dtype: DType) -> tuple[DType, type[np.floating[Any]]]:
    """The work type."""
    return (dtype, np.float64) if dtype is BY_NAME["float64"] else (F32, np.float32)


def _memory(address: int, n: int, dtype: Any) -> npt.NDArray[Any]:
    from fastmerge.ops.made import array

    return array(address, n, dtype)


def reference(op: Op, units: Units, experts: Sequence[int], tensor: Any, before: Sequence[Any]) -> list[Any]:
    """The definition, in plain torch.

    Args:
        op: of the tensor.
        units: what is drawn anew.
        experts: ``[E]`` their numbers.
        tensor: ``[R, C]``.
        before: ``E`` tensors ``[R, C]``: the experts with their noise.
    """
    import torch

    from fastmerge.ops import blocks, replicate

    x = blocks.work([tensor], op.spec)[0]
    masks = [m if m is None else torch.from_numpy(m) for m in drawn(units, experts, op.spec, 0, op.spec.numel)]
    parts = [torch.zeros_like(x) if m is None else torch.where(m, x, torch.zeros_like(x)) for m in masks]
    sums = [blocks.gram([p.reshape(1, -1), torch.ones_like(p).reshape(1, -1)])[0, :2] for p in parts]
    means, deviations = solve(op, units, np.stack(sums))
    out = []
    for e, (mask, kept) in enumerate(zip(masks, before, strict=True)):
        if mask is None:
            out.append(kept)
            continue
        mean = blocks.number(float(means[e]), x).clone().reshape(tensor.shape)
        made = replicate.reference(mean, experts[e : e + 1], [float(deviations[e])], op.key, op.spec.out_dtype)[0]
        out.append(torch.where(mask.reshape(tensor.shape), made, kept))
    return out
