"""Methods that compute each element from the inputs' values there, in numpy: one definition for every machine.

A block of elements at a time is widened, merged and rounded, so it stays in a core's cache and nothing is as large as a
tensor. Widening and rounding are the backend's ``combine``; between them every numpy operation is a single IEEE one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastmerge.dtypes import F32, F64, DType
from fastmerge.ops.kernels import Kernels
from fastmerge.ops.program import Program
from fastmerge.ops.segments import GROUP, HEADER, I64, LENGTH, OUT, Segments
from fastmerge.ops.spec import Op, Spec
from fastmerge.ops.tiles import Partial

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

Array: TypeAlias = "npt.NDArray[np.floating[Any]]"

BLOCK = 1 << 14
"""Elements at a time: 64 KiB for each of a dozen temporaries."""

Merge = Callable[[Op, list[Array], I64], Array]
"""From an op, a block of every input in the work type and the tensor's counts to the result, not yet rounded."""

Count = Callable[[Op, list[Array]], I64]
"""From a block to numbers that add up over the tensor."""


class ElementwiseProgram(Program):
    """One pass; where the method counts something of each tensor, one before it."""

    def __init__(self, ops: Sequence[Op], kernels: Kernels, merge: Merge, count: Count | None = None) -> None:
        """Takes the ops, a backend on host memory, and the method's mathematics."""
        self._ops = ops
        self._kernels = kernels
        self._merge = merge
        self._count = count
        self._counts: list[I64] | None = None if count else [np.zeros(0, np.int64)] * len(ops)

    @property
    def ready(self) -> bool:
        """Once everything is counted."""
        return self._counts is not None

    def pieces(self) -> I64 | None:
        """Everything."""
        return None

    def statistics(self, segments: Segments) -> Partial:
        """What is counted of each piece."""
        if self._count is None:
            raise AssertionError("nothing is counted")
        found = []
        for row in segments.table:
            op = self._ops[row[GROUP]]
            some = [self._count(op, xs) for _, _, xs in self._blocks(row, segments.dtypes, op.spec)]
            found.append(np.sum(some, axis=0) if some else np.zeros(0, np.int64))
        return Partial(segments.table[:, [GROUP]].copy(), np.zeros(0), found)

    def advance(self, partials: Sequence[Partial]) -> None:
        """Adds up; whole numbers, so in any order."""
        counts: list[Any] = [0] * len(self._ops)
        for p in partials:
            for group, some in zip(p.spans[:, 0].tolist(), p.extra, strict=True):
                counts[group] = counts[group] + some if len(some) else counts[group]
        self._counts = counts

    def apply(self, segments: Segments) -> None:
        """Every block of every piece."""
        if self._counts is None:
            raise AssertionError("apply before the statistics are complete")
        size = segments.out_dtype.size
        for i, row in enumerate(segments.table):
            op = self._ops[row[GROUP]]
            for at, n, xs in self._blocks(row, segments.dtypes, op.spec):
                with np.errstate(all="ignore"):
                    made = np.ascontiguousarray(self._merge(op, xs, self._counts[row[GROUP]]))
                wide = F64 if made.dtype == np.float64 else F32
                bad = convert(
                    self._kernels, wide, segments.out_dtype, [made.ctypes.data], [int(row[OUT]) + at * size], n
                )
                if len(segments.nonfinite):
                    segments.nonfinite[i] += bad

    def _blocks(self, row: I64, dtypes: Sequence[DType], spec: Spec) -> Iterator[tuple[int, int, list[Array]]]:
        """(first element, elements, every input in the work type) of the blocks of a piece."""
        wide, number = (F64, np.float64) if spec.double else (F32, np.float32)
        total = int(row[LENGTH])
        room: list[Array] = [np.empty(min(BLOCK, total), number) for _ in dtypes]
        addresses = row[HEADER : HEADER + len(dtypes)].tolist()
        for at in range(0, total, BLOCK):
            n = min(BLOCK, total - at)
            for dtype in dict.fromkeys(dtypes):
                which = [i for i, d in enumerate(dtypes) if d is dtype]
                places = [addresses[i] + at * dtype.size for i in which]
                convert(self._kernels, dtype, wide, places, [room[i].ctypes.data for i in which], n)
            yield at, n, [x[:n] for x in room]


def convert(kernels: Kernels, source: DType, to: DType, places: Sequence[int], outs: Sequence[int], n: int) -> int:
    """Runs of n elements of one type in another: weighted sums of one. Gives how many results are not finite."""
    rows = [[out, n, 0, n, 0, 0, 0, place] for place, out in zip(places, outs, strict=True)]
    segments = Segments(np.array(rows, np.int64), (source,), to, np.zeros(len(rows), np.int64))
    kernels.combine(segments, np.ones((1, 1)), np.ones((1, 2)), delta=False, per_row=False)
    return int(segments.nonfinite.sum())


def reference(op: Op, inputs: Sequence[torch.Tensor], merge: Merge, count: Count | None = None) -> torch.Tensor:
    """The same of a tensor in torch."""
    import torch

    from fastmerge.ops import blocks

    counts = np.zeros(0, np.int64)
    if count is not None:
        found = [count(op, [x.numpy() for x in xs]) for _, xs in blocks.pieces(inputs, op.spec)]
        counts = np.sum(found, axis=0) if found else counts

    def merged(_: slice, xs: list[torch.Tensor]) -> torch.Tensor:
        with np.errstate(all="ignore"):
            return torch.from_numpy(merge(op, [x.numpy() for x in xs], counts))

    return blocks.in_pieces(inputs, op.spec, merged)
