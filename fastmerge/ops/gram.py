"""Family gram: inner products, a solve on the host, then a weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastmerge.ops.program import Program
from fastmerge.ops.segments import F64, I64, TILE, Segments
from fastmerge.ops.spec import Op
from fastmerge.ops.tiles import Partial, gather, number

Solve = Callable[[Sequence[Op], F64, Sequence[int]], tuple[F64, F64]]
"""From groups, inner products ``[P, C]`` and vectors per group to coefficients ``[P, M]`` and scales ``[P, 2]``."""


class GramProgram(Program):
    """One pass of inner products per tensor or row, the solve, one pass of combine."""

    def __init__(
        self,
        kernels: Any,
        groups: Sequence[Op],
        solve: Solve,
        *,
        per_row: bool,
        delta: bool,
        diff: bool = False,
    ) -> None:
        """Sets up the pass.

        Args:
            kernels: the backend.
            groups: tensors with the same number of inputs.
            solve: the method's mathematics; runs once, in fp64.
            per_row: a vector is a row of the last dimension, not the whole tensor.
            delta: work on differences from input 0, in the statistics and in the result.
            diff: also sum the squared difference of the first two vectors.
        """
        self._kernels = kernels
        self._groups = groups
        self._solve = solve
        self._per_row = per_row
        self._delta = delta
        self._diff = diff
        numel = np.array([g.spec.numel for g in groups], np.int64)
        if per_row:
            row = np.array([max(g.spec.row, 1) for g in groups], np.int64)
            self._vectors = numel // row
            self._tiles_each = -(-row // TILE)
        else:
            self._vectors = np.ones(len(groups), np.int64)
            self._tiles_each = -(-numel // TILE)
        self._first = np.cumsum(self._vectors) - self._vectors
        vectors = len(groups[0].spec.dtypes) - delta
        self._columns = vectors * (vectors + 1) // 2 + diff
        self._tables: tuple[F64, F64] | None = None

    @property
    def ready(self) -> bool:
        """True once the coefficients are known."""
        return self._tables is not None

    def pieces(self) -> I64 | None:
        """Everything."""
        return None

    def statistics(self, segments: Segments) -> Partial:
        """Inner products of every tile of the pieces."""
        numbered, spans, tiles = number(segments, per_row=self._per_row)
        partials = np.empty((tiles, self._columns))
        self._kernels.gram(numbered, partials, delta=self._delta, diff=self._diff, per_row=self._per_row)
        return Partial(spans, partials)

    def advance(self, partials: Sequence[Partial]) -> None:
        """Adds tiles in order, then solves."""
        ordered = gather(partials, self._vectors * self._tiles_each)
        tiles = np.repeat(self._tiles_each, self._vectors)
        stats = self._kernels.fold(ordered, np.concatenate([[0], np.cumsum(tiles)]))
        coef, scale = self._solve(self._groups, stats, self._vectors.tolist())
        self._tables = np.ascontiguousarray(coef), np.ascontiguousarray(scale)

    def apply(self, segments: Segments) -> None:
        """The weighted sum; parameter rows are those of the first vector of each group."""
        if self._tables is None:
            raise AssertionError("apply before the statistics are complete")
        table = segments.table.copy()
        table[:, 5] = self._first[table[:, 5]]
        moved = Segments(table, segments.dtypes, segments.out_dtype, segments.nonfinite)
        self._kernels.combine(moved, *self._tables, delta=self._delta, per_row=self._per_row)
