"""A weight with a low-rank update on top, as LoRA adapters state it (arXiv:2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.dtypes import F32, F64, DType
from fastmerge.ops.made import NUMPY, array, load, widen
from fastmerge.ops.sources import Bring, workspace
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt

PANEL = 1 << 18
"""Elements of a weight that an update is added to at a time: a part of A is put in order once for all of their rows."""


def low_rank(
    out: npt.NDArray[Any],
    x: npt.NDArray[np.uint8],
    dtype: DType,
    left: npt.NDArray[Any],
    right: npt.NDArray[Any],
    scale: float,
) -> None:
    """``x + scale (left right)``: each product and each sum is rounded once, in the order of the inner index.

    Args:
        out: ``[rows, columns]`` in fp32, or fp64 where ``x`` is; contiguous.
        x: the bytes of as many elements.
        dtype: their type.
        left: ``[rows, R]``, R >= 1, contiguous; of the type of ``out``.
        right: ``[R, columns]``; its rows are contiguous.
        scale: rounded once to the type of ``out``.
    """
    (rows, columns), rank, kind = out.shape, left.shape[1], out.dtype.type
    if dtype is not F64:
        try:
            from fastmerge import _native
        except ImportError:
            pass
        else:
            to, b, a, base = (array.ctypes.data for array in (out, left, right, x))
            stride = max(columns, right.strides[0] // right.itemsize)
            _native.low_rank(to, b, a, base, scale, rows, columns, rank, stride, dtype.code)
            return
    update = left[:, 0, None] * right[0]
    spare = np.empty_like(update)
    for k in range(1, rank):
        np.add(update, np.multiply(left[:, k, None], right[k], spare), update)
    np.multiply(update, kind(scale), update)
    widen(x, dtype, out.reshape(-1))
    np.add(out, update, out)


@dataclass(frozen=True, eq=False)
class LowRank:
    """``base + scale (B A)``, as LoRA adapters state a weight; exact products and sums in fp32, in the order of ranks.

    Each element is ``x + s (b0 a0 + b1 a1 + ...)``, every operation rounded once to fp32 (fp64 for an fp64 base).

    Attributes:
        base: ``[O, I]``.
        b: ``[O, R]``.
        a: ``[R, I]``.
        scale: factor of the update.
        transposed: the base is stored as ``[I, O]`` (Conv1D, embeddings), and so is the result.
    """

    base: Source
    b: Source
    a: Source
    scale: float
    transposed: bool = False

    @property
    def dtype(self) -> DType:
        """fp32, or fp64: nothing is rounded to the base's type."""
        return F64 if self.base.dtype is F64 else F32

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base."""
        return self.base.shape

    @property
    def inputs(self) -> tuple[Source, ...]:
        """The weight, and the factors."""
        return (self.base, self.b, self.a)

    @property
    def workspace(self) -> int:
        """Both factors twice (as they are stored, and as they are used), and a panel of the weight and two of sums."""
        rank, numbers = self.a.shape[0], sum(self.b.shape[:1] + self.a.shape[1:])
        strip = 256 * rank  # what the kernel works in
        return 2 * self.dtype.size * (rank * numbers + PANEL) + 8 * PANEL + strip + workspace(self.base)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Panels of whole rows, or a part of one: the order of a single element is that of the ranks."""
        if not n:
            return
        work = NUMPY[self.dtype]
        width, base = self.shape[-1], self.base
        first, last = e0 // width, (e0 + n - 1) // width
        left, right = (x.astype(work, copy=False) for x in self._factors(bring, first, last - first + 1))
        out = array(address, n, work)
        raw = np.empty(min(n, PANEL) * base.dtype.size, np.uint8)
        at = e0
        while at < e0 + n:
            row, column = divmod(at, width)
            columns = min(width - column, e0 + n - at, PANEL)
            rows = max(1, min(e0 + n - at, PANEL) // width) if columns == width else 1
            count = rows * columns
            bring(base, np.array([[at, count, raw.ctypes.data]], np.int64))
            part = out[at - e0 : at - e0 + count].reshape(rows, columns)
            b = left[row - first : row - first + rows]
            low_rank(
                part, raw[: count * base.dtype.size], base.dtype, b, right[:, column : column + columns], self.scale
            )
            at += count

    def _factors(self, bring: Bring, first: int, rows: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """``[rows, R]`` and ``[R, columns]`` of some rows of the result; those of a transposed one are columns of A."""
        rank, width = self.a.shape[0], self.shape[-1]
        if not self.transposed:
            b = load(bring, self.b, first * rank, rows * rank).reshape(rows, rank)
            return b, load(bring, self.a, 0, rank * width).reshape(rank, width)
        columns = self.a.shape[1]
        a = np.stack([load(bring, self.a, k * columns + first, rows) for k in range(rank)], axis=1)
        b = load(bring, self.b, 0, width * rank).reshape(width, rank)
        return a, np.ascontiguousarray(b.T)
