"""Tensors in a GPU's memory: no schedule, no slots and no threads; each batch is one sequence of launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from fastmerge.checkpoint import without_gc
from fastmerge.ops.program import Bound, Program
from fastmerge.ops.segments import Segments
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op
from fastmerge.runtime.stream import compute


def resident(ops: Sequence[Op], program: Callable[[Sequence[Op]], Program]) -> None:
    """Runs ops whose tensors are all in the memory of one device, on the current stream.

    Everything is launched before anything is waited for, and only methods that can fail on their data wait at all.

    Args:
        ops: their sources and targets are :class:`Memory`.
        program: makes the program of the ops of one batch.

    Raises:
        OutputError: of a method, once everything has been launched.
    """
    started = []
    for batch, segments in batches(ops):
        made = program(batch)
        bound = made.bind(segments)
        if bound is None:
            compute(made, segments)
        else:
            bound.run()
            started.append(bound)
    for bound in started:
        bound.check()


def bind(ops: Sequence[Op], program: Callable[[Sequence[Op]], Program]) -> list[Bound]:
    """The same, to be run as often as wanted: for what binds, that is kernels of a device."""
    bound = [program(batch).bind(segments) for batch, segments in batches(ops)]
    return [b for b in bound if b is not None]


@without_gc()
def batches(ops: Sequence[Op]) -> list[tuple[list[Op], Segments]]:
    """Ops that can share a call, with their table: whole tensors, one group each."""
    kinds: dict[tuple[object, ...], list[Op]] = {}
    known: dict[int, list[Op]] = {}
    for op in ops:  # ops of one spec are of one batch; specs live as long as their ops
        mine = known.get(id(op.spec))
        if mine is None:
            mine = known[id(op.spec)] = kinds.setdefault((*op.spec.batch, op.spec.grain, len(op.targets)), [])
        mine.append(op)
    return [(some, _table(some)) for some in kinds.values()]


def _table(ops: Sequence[Op]) -> Segments:
    rows = []
    for group, op in enumerate(ops):
        spec, key = op.spec, op.key
        out, *more = (cast("Memory", t).address for t in op.targets)
        inputs = [cast("Memory", s).address for s in op.inputs]
        rows.append((out, spec.numel, 0, spec.row, key - ((key >> 63) << 64), group, 0, *inputs, *more))
    return Segments(np.array(rows, np.int64), ops[0].spec.dtypes, ops[0].spec.out_dtype)
