"""Tensors in a GPU's memory: no schedule, no slots and no threads; each batch is one sequence of launches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fastmerge.checkpoint import without_gc
from fastmerge.ops.program import Bound
from fastmerge.ops.segments import HEADER, OUT, Segments, segment_table
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op
from fastmerge.runtime.stream import compute

if TYPE_CHECKING:
    from fastmerge.backends.choose import Backend

MOST_KEPT = 64
"""Calls of one tensor whose launches are kept, without memory of the device: tools merge tensor by tensor."""

_KEPT: dict[tuple[object, ...], Bound] = {}
"""By device and specs, which are compared by identity."""


def resident(ops: Sequence[Op], backend: Backend) -> None:
    """Runs ops whose tensors are all in the memory of one device, on the current stream.

    Everything is launched before anything is waited for, and only methods that can fail on their data wait at all.

    Args:
        ops: their sources and targets are :class:`Memory`.
        backend: of that device.

    Raises:
        OutputError: of a method, once everything has been launched.
    """
    started: list[tuple[Bound, tuple[object, ...] | None]] = []
    with current(backend.home):
        try:
            for batch, segments in batches(ops):
                bound, key = _kept(batch, segments, backend)
                if bound is not None:
                    started.append((bound, key))
                    bound.run()
            for bound, _ in started:
                bound.check()
        finally:
            for bound, key in started:
                bound.release()
                if key is not None:  # back only now: until here it was this thread's alone
                    _KEPT[key] = bound
                    while len(_KEPT) > MOST_KEPT:
                        _KEPT.pop(next(iter(_KEPT)), None)


def current(home: str) -> AbstractContextManager[Any]:
    """Makes the tensors' device the current one."""
    if not home.startswith("cuda"):
        return nullcontext()
    import torch

    found: AbstractContextManager[Any] = torch.cuda.device(home)
    return found


def bind(ops: Sequence[Op], backend: Backend) -> list[Bound]:
    """The same, to be run as often as wanted: for what binds, that is kernels of a device."""
    with current(backend.home):
        bound = [backend.program(batch).bind(segments) for batch, segments in batches(ops)]
    return [b for b in bound if b is not None]


def _kept(ops: list[Op], segments: Segments, backend: Backend) -> tuple[Bound | None, tuple[object, ...] | None]:
    """The launches of a batch: of one tensor those of an earlier one, with other addresses, where it was alike.

    None where a program works pass by pass, or by a definition in plain torch: that has then been done.
    What they depend on beside addresses are the specs, the device, and whether all addresses are multiples of 16.

    Returns:
        The launches, and under which key they may be kept.
    """
    if len(ops) > 1:  # their order may depend on names, and their specs are a call's own
        return _bound(ops, segments, backend), None
    table = segments.table
    aligned = not int(np.bitwise_or.reduce(table[:, [OUT, *range(HEADER, table.shape[1])]], axis=None)) % 16
    if not aligned:
        return _bound(ops, segments, backend), None
    key = (backend.name, backend.home, ops[0].spec)
    known = _KEPT.pop(key, None)
    if known is not None and known.move(segments, ops):
        return known, key
    return _bound(ops, segments, backend), key


def _bound(ops: list[Op], segments: Segments, backend: Backend) -> Bound | None:
    program = backend.program(ops)
    bound = program.bind(segments)
    if bound is None:
        compute(program, segments)
    return bound


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
    """One row per op."""
    spec = ops[0].spec
    outs = [
        [cast("Memory", target).address for target in column]
        for column in zip(*[op.targets for op in ops], strict=True)
    ]
    inputs = [
        [cast("Memory", source).address for source in column] for column in zip(*[op.inputs for op in ops], strict=True)
    ]
    table = segment_table(ops, range(len(ops)), [0] * len(ops), [op.spec.numel for op in ops], outs, inputs)
    return Segments(table, spec.dtypes, spec.out_dtype)
