"""Runs ops whose inputs and results are in memory, on the cores of the CPU.

What needs no passes, because there are none or because their results are known, goes straight to the kernels: tables
of pieces, as many calls as keep the cores busy. Several ops of the same inputs (candidates of a search) go piece by
piece: a piece of the inputs comes from memory once and stays in the cache for all of them. Everything else takes the
workers of a merge on disk, and what their passes find is kept.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from fastmerge.backends.choose import Backend
from fastmerge.errors import CheckpointError
from fastmerge.ops.program import Program
from fastmerge.ops.segments import E0, HEADER, I64, LENGTH, OUT, ROW, TILE, Segments, segment_table
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Spec
from fastmerge.runtime.budget import UNIT_ELEMENTS, need
from fastmerge.runtime.devices import CpuDevice, cores
from fastmerge.runtime.results import Results
from fastmerge.runtime.schedule import schedule
from fastmerge.runtime.stores import OpStore
from fastmerge.runtime.workers import Runner, each
from fastmerge.session.statistics import Statistics

CALL = 1 << 19
"""Elements of results that a call makes at least: a tenth of a millisecond, next to which the call is nothing."""

CALLS = 32
"""Calls for each core, where there is so much work: the last one that ends is not waited for long."""

COPY = 4 << 20
"""Bytes that a call copies."""

FAR = 32 << 20
"""Bytes of results beyond which nobody finds them in a cache."""

Call = Callable[[], object]


def run(ops: Sequence[Op], backend: Backend, known: Statistics) -> None:
    """Computes all ops.

    Args:
        ops: with inputs and targets in memory; those of the same inputs next to each other.
        backend: of the CPU.
        known: what passes have found; receives what they find now.

    Raises:
        OutputError: of a method that its data does not suit; results may be written in part then.
    """
    calls: list[Call] = []
    rest: list[Op] = []
    groups: dict[tuple[object, ...], list[Op]] = {}
    ways: dict[Spec, list[Op]] = {}
    for op in ops:
        spec = op.spec
        if not all(type(source) is Memory for source in op.inputs):
            rest.append(op)
        elif spec.grain == "copy":
            calls += _copies(op)
        else:
            if spec not in ways:
                key = (*spec.batch, spec.grain, len(op.inputs), len(op.targets))
                ways[spec] = rest if backend.whole(spec) else groups.setdefault(key, [])
            ways[spec].append(op)
    far = sum(op.spec.numel * op.spec.out_dtype.size for op in ops) > FAR
    later: list[Op] = []
    for group in groups.values():
        ready, due, again = _sorted(group, backend, known)
        rest += due
        later += again
        if ready is not None:
            calls += _calls(*ready, far=far)
    _spread(calls)
    if rest:
        _passes(rest, backend, known)
    if later:
        run(later, backend, known)


def check(ops: Sequence[Op], same: Callable[[Memory, Memory], bool] | None = None) -> None:
    """Compares what is copied only where every model has the same bytes; once, as inputs do not change.

    Args:
        ops: of a plan.
        same: compares two tensors; None for those in the memory of the host.

    Raises:
        CheckpointError: naming every tensor in which models differ.
    """
    problems = []
    for op in ops:
        there = [source for source in op.inputs if type(source) is Memory] if op.spec.grain == "copy" else []
        if not all((same or _same)(there[0], other) for other in there[1:]):
            kind = op.spec.out_dtype.name
            problems.append(f"{op.name}: {kind} tensors are copied, not merged, and the models differ")
    if problems:
        raise CheckpointError(problems)


def _same(one: Memory, other: Memory) -> bool:
    return _bytes(one) == _bytes(other)


def _bytes(source: Memory) -> memoryview:
    count = source.dtype.nbytes(int(np.prod(source.shape, dtype=np.int64)))
    return memoryview((ctypes.c_char * count).from_address(source.address)).cast("B")


def _sorted(
    group: list[Op], backend: Backend, known: Statistics
) -> tuple[tuple[list[Op], Program] | None, list[Op], list[Op]]:
    """The ops of one kind that are ready, with their program; those that take passes; those that wait for these."""
    program = backend.program(group)
    if program.ready:
        return (group, program), [], []
    asks = program.asks()
    if asks is None:
        return None, group, []
    found = known.of(group, asks)
    due: list[Op] = []
    again: list[Op] = []
    seen = set()
    for op, ask, one in zip(group, asks, found, strict=True):
        if one is None:
            key = (op.inputs, ask)
            (again if key in seen else due).append(op)
            seen.add(key)
    if due:
        left = [i for i, one in enumerate(found) if one is not None]
        group, found = [group[i] for i in left], [found[i] for i in left]
        if not group:
            return None, due, again
        program = backend.program(group)
    program.give(found)
    if not program.ready:  # other passes follow, of which nothing is kept
        return None, [*due, *again, *group], []
    return (group, program), due, again


def _calls(ops: list[Op], program: Program, *, far: bool) -> list[Call]:
    """The calls that apply a program to whole tensors; pieces of the same inputs stay in one."""
    table, spec = _table(ops), ops[0].spec
    if not len(table):
        return []
    ends = np.cumsum(table[:, LENGTH])
    size = max(CALL, int(ends[-1]) // (cores() * CALLS))
    cuts = np.append(np.flatnonzero((table[1:, HEADER:] != table[:-1, HEADER:]).any(axis=1)) + 1, len(table))
    marks = cuts[np.searchsorted(cuts, np.searchsorted(ends, np.arange(size, int(ends[-1]), size)) + 1)]
    marks = np.unique(np.concatenate([[0], marks, [len(table)]]))

    def call(start: int, stop: int) -> Call:
        return lambda: program.apply(Segments(table[start:stop], spec.dtypes, spec.out_dtype, far=far))

    return [call(a, b) for a, b in itertools.pairwise(marks.tolist())]


def _table(ops: list[Op]) -> I64:
    """Pieces of whole tensors: of ops of the same inputs one after the other, of each piece all of them."""
    spec, count = ops[0].spec, len(ops)
    outs = [cast("Memory", op.targets[0]).address for op in ops]
    inputs = [[cast("Memory", s).address for s in column] for column in zip(*[op.inputs for op in ops], strict=True)]
    numel = [op.spec.numel for op in ops]
    whole = segment_table(ops, range(count), [0] * count, numel, [outs], inputs)
    new = [i == 0 or op.inputs != ops[i - 1].inputs for i, op in enumerate(ops)]
    block = np.cumsum(new) - 1
    steps = np.where(np.bincount(block)[block] > 1, TILE, CALL)
    if spec.grain == "row":
        rows = np.maximum(whole[:, ROW], 1)
        steps = np.maximum(1, steps // rows) * rows
    pieces = -(-whole[:, LENGTH] // steps)
    owner = np.repeat(np.arange(count), pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    order = np.lexsort((owner, number, block[owner]))
    owner, number = owner[order], number[order]
    table, first = whole[owner], number * steps[owner]
    table[:, LENGTH] = np.minimum(steps[owner], table[:, LENGTH] - first)
    table[:, E0] = first
    table[:, OUT] += first * spec.out_dtype.size
    table[:, HEADER:] += first[:, None] * np.array([d.size for d in spec.dtypes], np.int64)
    return table


def _copies(op: Op) -> list[Call]:
    """The calls that copy a tensor."""
    source, target = cast("Memory", op.inputs[0]), cast("Memory", op.targets[0])
    total = op.spec.out_dtype.nbytes(op.spec.numel)

    def call(at: int) -> Call:
        return lambda: ctypes.memmove(target.address + at, source.address + at, min(COPY, total - at))

    return [call(at) for at in range(0, total, COPY)]


def _spread(calls: Sequence[Call]) -> None:
    """Makes all calls, on all cores."""
    left = deque(calls)

    def work(_: int) -> None:
        while True:
            try:
                call = left.popleft()
            except IndexError:
                return
            call()

    each(work, range(min(cores(), len(calls))), name="render")


def _passes(ops: Sequence[Op], backend: Backend, known: Statistics) -> None:
    """All passes of all ops, as a merge on disk has them."""
    made: list[tuple[Sequence[Op], Program]] = []

    def program(some: Sequence[Op]) -> Program:
        built = backend.program(some)
        made.append((some, built))
        return built

    slot = need(ops, whole=backend.whole).best
    jobs = schedule(ops, slot=slot, elements=UNIT_ELEMENTS, whole=backend.whole)
    store = OpStore(ops, results=Results(backend, ops, "warn"))
    Runner(ops, jobs, store, [CpuDevice() for _ in range(cores())], program, slot=slot).run()
    for some, built in made:
        asks = built.asks()
        if asks is not None and all(type(s) is Memory for op in some for s in op.inputs):
            known.keep(some, asks, built.found())
