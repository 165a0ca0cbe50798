"""The base, with those elements of one other model whose importance is an outlier: one whole tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.ops.kernels import Kernels
from fastmerge.ops.program import OnePass
from fastmerge.ops.segments import E0, GROUP, LENGTH, Segments
from fastmerge.ops.spec import Op

if TYPE_CHECKING:
    import numpy.typing as npt


def outlying(importance: npt.NDArray[Any]) -> float:
    """From which value on importances are outliers: the median and 1.5 times the distance of the quartiles.

    Quantile q is the element ``floor(q (n - 1))`` in order; every NaN is above infinity.

    Args:
        importance: ``[n]`` of the work type, n > 0; it is put in another order.
    """
    last = len(importance) - 1
    quarter, half, three = last // 4, last // 2, 3 * last // 4
    # One after the other: numpy has vector code where one place is asked for.
    importance.partition(half)
    if quarter < half:
        importance[:half].partition(quarter)
    if three > half:
        importance[half + 1 :].partition(three - half - 1)
    with np.errstate(all="ignore"):
        spread = importance.dtype.type(1.5) * (importance[three] - importance[quarter])
        return float(importance[half] + spread)


class FusionProgram(OnePass):
    """Divergences and importances, their outliers, the merge."""

    def __init__(self, ops: Sequence[Op], kernels: Kernels) -> None:
        """Takes ops of a base and one model, and a backend on host memory."""
        self._ops = ops
        self._kernels = kernels

    def apply(self, segments: Segments) -> None:
        """Every tensor."""
        for i, row in enumerate(segments.table):
            op = self._ops[int(row[GROUP])]
            if row[E0] or row[LENGTH] != op.spec.numel:
                raise ValueError(f"{op.name}: expected a whole tensor, got {row[LENGTH]} of {op.spec.numel}")
            if not op.spec.numel:
                continue
            table = row[None].copy()
            table[:, GROUP] = 0
            one = segments.pieces(table, segments.nonfinite[i : i + 1])
            divergence = np.empty(op.spec.rows)
            importance = np.empty(op.spec.numel, np.float64 if op.spec.double else np.float32)
            self._kernels.importance(one, divergence, importance)
            self._kernels.fuse(one, divergence, outlying(importance))
