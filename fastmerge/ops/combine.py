"""Family combine: weighted sums, no statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmerge.ops.program import Program
from fastmerge.ops.segments import F64, I64, Segments


class CombineProgram(Program):
    """``(sum c_i x_i) / div``, or ``b + lambda (sum c_i (x_i - b)) / div``; ready at once."""

    ready = True

    def __init__(self, kernels: Any, coef: F64, scale: F64, *, delta: bool) -> None:
        """Takes the tables.

        Args:
            kernels: the backend.
            coef: ``[P, M]``, one row per group; with ``delta`` the base's coefficient is ignored.
            scale: ``[P, 2]`` lambda, divisor.
            delta: combine deltas from input 0 instead of the inputs.
        """
        self._kernels = kernels
        self._coef = coef
        self._scale = scale
        self._delta = delta

    def pieces(self) -> I64 | None:
        """Never asked for."""
        return None

    def statistics(self, segments: Segments) -> Any:
        """No pass is ever due."""
        raise AssertionError("combine has no statistics")

    def advance(self, partials: Sequence[Any]) -> None:
        """No pass is ever due."""
        raise AssertionError("combine has no statistics")

    def apply(self, segments: Segments) -> None:
        """One kernel call."""
        self._kernels.combine(segments, self._coef, self._scale, delta=self._delta, per_row=False)
