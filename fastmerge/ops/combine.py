"""Family combine: weighted sums, no statistics."""

from __future__ import annotations

from fastmerge.ops.kernels import Kernels
from fastmerge.ops.program import OnePass
from fastmerge.ops.segments import F64, Segments


class CombineProgram(OnePass):
    """``(sum c_i x_i) / div``, or ``b + lambda (sum c_i (x_i - b)) / div``; ready at once."""

    def __init__(self, kernels: Kernels, coef: F64, scale: F64, *, delta: bool) -> None:
        """Takes the tables.

        Args:
            kernels: the backend.
            coef: ``[P, M]``, one row per tensor; with ``delta`` the base's coefficient is ignored.
            scale: ``[P, 2]`` lambda, divisor.
            delta: combine deltas from input 0 instead of the inputs.
        """
        self._kernels = kernels
        self._coef = coef
        self._scale = scale
        self._delta = delta

    def apply(self, segments: Segments) -> None:
        """One kernel call."""
        self._kernels.combine(segments, self._coef, self._scale, delta=self._delta, per_row=False)
