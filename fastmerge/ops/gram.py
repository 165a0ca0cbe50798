"""Family gram: inner products, a solve on the host, then a weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastmerge.errors import OutputError
from fastmerge.ops.kernels import Kernels
from fastmerge.ops.per_spec import PerSpec
from fastmerge.ops.program import Bound, Launches, Program
from fastmerge.ops.segments import F64, GROUP, I64, TILE, Segments
from fastmerge.ops.spec import Op
from fastmerge.ops.tiles import Partial, gather, number

Solve = Callable[[Sequence[Op], F64, Sequence[int]], tuple[F64, F64]]
"""From ops, inner products ``[P, C]`` and vectors per op to coefficients ``[P, M]`` and scales ``[P, 2]``."""

Steps = Callable[[Any, Any, Sequence[Op]], tuple[Any, Any]]
"""The same on a device: from a sequence, its vectors and the ops to tables there."""

ANGLE = "the angle between its inputs is unknown"


def check_sums(ops: Sequence[Op], stats: F64, rows: Sequence[int], what: str = ANGLE) -> None:
    """Refuses inner products that are not finite: nothing follows from them.

    Args:
        ops: of the tensors.
        stats: ``[P, C]``, of all vectors in order.
        rows: vectors per op.
        what: the method wanted to know from them.

    Raises:
        OutputError: with the tensor, and the row where its vectors are rows.
    """
    finite = np.isfinite(stats).all(axis=1)
    if not finite.all():
        refuse(ops, int(np.argmin(finite)), rows, what)


def place(ops: Sequence[Op], vector: int, rows: Sequence[int]) -> tuple[Op, str]:
    """The op of a vector, and how errors call the vector."""
    ends = np.cumsum(rows)
    i = int(np.searchsorted(ends, vector, side="right"))
    return ops[i], ops[i].name + (f" (row {vector - int(ends[i]) + rows[i]})" if rows[i] > 1 else "")


def refuse(ops: Sequence[Op], bad: int, rows: Sequence[int], what: str = ANGLE) -> None:
    """Raises the error of :func:`check_sums` for vector ``bad``."""
    op, name = place(ops, bad, rows)
    kind = "float64" if op.spec.double else "float32"
    raise OutputError(
        f"{name}: {what}: an input holds NaN or Inf, "
        f"or values whose squares add up to more than {kind} holds; expected finite sums of squares"
    )


class GramProgram(Program):
    """One pass of inner products per tensor or row, the solve, one pass of combine."""

    def __init__(
        self,
        kernels: Kernels,
        ops: Sequence[Op],
        solve: Solve,
        *,
        per_row: bool,
        delta: bool,
        diff: bool = False,
        steps: Steps | None = None,
    ) -> None:
        """Sets up the pass.

        Args:
            kernels: the backend.
            ops: tensors with the same number of inputs.
            solve: the method's mathematics; runs once, in fp64.
            per_row: a vector is a row of the last dimension, not the whole tensor.
            delta: work on differences from input 0, in the statistics and in the result.
            diff: also sum the squared difference of the first two vectors.
            steps: the solve as steps of a sequence on a device; None where a device has no kernel for it.
        """
        self._kernels = kernels
        self._ops = ops
        self._solve = solve
        self._per_row = per_row
        self._delta = delta
        self._diff = diff
        self._steps = steps
        specs = PerSpec(lambda spec: spec, ops)
        numel = specs.integers(lambda spec, _: spec.numel)
        if per_row:
            row = specs.integers(lambda spec, _: max(spec.row, 1))
            self._vectors = numel // row
            self._tiles_each = -(-row // TILE)
        else:
            self._vectors = np.ones(len(ops), np.int64)
            self._tiles_each = -(-numel // TILE)
        self._first = np.cumsum(self._vectors) - self._vectors
        vectors = len(ops[0].spec.dtypes) - delta
        self._columns = vectors * (vectors + 1) // 2 + diff
        self._stats: F64 | None = None
        self._tables: tuple[F64, F64] | None = None

    def asks(self) -> Sequence[Hashable]:
        """Inner products depend on the vectors alone."""
        return [("gram", self._per_row, self._delta, self._diff)] * len(self._ops)

    def found(self) -> Sequence[F64]:
        """The inner products of each op's vectors."""
        assert self._stats is not None
        return [rows.copy() for rows in np.split(self._stats, self._first[1:])]

    def give(self, found: Sequence[F64]) -> None:
        """Solves at once."""
        self._finish(np.concatenate(found))

    @property
    def ready(self) -> bool:
        """True once the coefficients are known."""
        return self._tables is not None

    def bind(self, segments: Segments) -> Bound | None:
        """Sums, solve and the weighted sum, one behind the other; the last alone where inner products were given."""
        launcher, known, rows = self._kernels.launcher, self._tables, self._vectors.tolist()
        if launcher is None or (known is None and self._steps is None):
            return None
        s = launcher.sequence(segments, per_row=self._per_row)
        if known is not None:
            s.combine(*known, delta=self._delta, div=bool((known[1][:, 1] != 1).any()), first=self._first)
            return Launches(s)
        assert self._steps is not None
        vectors = s.gram(delta=self._delta, diff=self._diff)
        coef, scale = self._steps(s, vectors, self._ops)
        s.combine(coef, scale, delta=self._delta, div=self._delta, first=vectors.here[:-1])

        def check(_: Any, bad: int, ops: Sequence[Op]) -> None:
            refuse(ops, bad, rows)

        return Launches(s, self._ops, check, lambda s: np.split(s.array(vectors.sums), self._first[1:]))

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
        self._finish(self._kernels.fold(ordered, np.concatenate([[0], np.cumsum(tiles)])))

    def _finish(self, stats: F64) -> None:
        self._stats = stats
        coef, scale = self._solve(self._ops, stats, self._vectors.tolist())
        self._tables = np.ascontiguousarray(coef), np.ascontiguousarray(scale)

    def apply(self, segments: Segments) -> None:
        """The weighted sum; parameter rows are those of the first vector of each tensor."""
        if self._tables is None:
            raise AssertionError("apply before the statistics are complete")
        table = segments.table.copy()
        table[:, GROUP] = self._first[table[:, GROUP]]
        moved = replace(segments, table=table)
        self._kernels.combine(moved, *self._tables, delta=self._delta, per_row=self._per_row)
