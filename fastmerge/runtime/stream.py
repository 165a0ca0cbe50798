"""What the workers take and bring back.

Each worker takes the next unit in file order, reads its inputs into its own slot, lets the device compute,
and hands the result to the store. Jobs whose data does not fit one unit pass a barrier between passes: the
worker that brings the last partial result solves. Units of a due pass go before anything new, the earliest job first:
what was kept for its result takes memory.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from fastmerge.ops.program import Program
from fastmerge.ops.segments import E0, GROUP, HEADER, I64, LENGTH, OUT, Segments
from fastmerge.ops.spec import Op
from fastmerge.runtime.devices import Buffer
from fastmerge.runtime.schedule import Job, Unit, sample_units


class Store(Protocol):
    """Where inputs come from and results go: files, or tensors that a caller owns.

    Attributes:
        durable: whether :meth:`sync` has anything to do, and a stop must leave things in order.
    """

    @property
    def durable(self) -> bool: ...  # noqa: D102  described above

    def reads(self, unit: Unit) -> bool:
        """Whether loading the unit brings its inputs; not where an earlier pass left them in memory."""

    def load(self, job: Job, unit: Unit, buffer: Buffer, *, again: bool = False) -> Segments:
        """Brings the unit's inputs to addresses and assigns its output addresses.

        Args:
            job: of the unit.
            unit: to be brought.
            buffer: the worker's slot.
            again: whether a later pass asks for the same unit.
        """

    def store(self, unit: Unit, segments: Segments) -> None:
        """Keeps the computed outputs of the unit."""

    def copy(self, unit: Unit) -> None:
        """Copies the byte ranges of a ``copy`` unit."""

    def done(self, job: Job, unit: Unit) -> bool:
        """Whether an earlier run already finished the unit."""

    def sync(self) -> None:
        """Makes what is stored durable."""


ProgramFactory = Callable[[Sequence[Op]], Program]


@dataclass
class Stats:
    """What the workers did, summed over all of them: seconds by stage, bytes, units."""

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    units: int = 0
    notes: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **amounts: float) -> None:
        """Adds to the named sums, from any thread."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    @property
    def bottleneck(self) -> str:
        """The stage in which the workers spent most of their time."""
        return max(("read", "compute", "write"), key=lambda s: getattr(self, s))


@dataclass
class Running:
    """A job under way."""

    job: Job
    program: Program | None = None
    partials: list[tuple[int, Any]] = field(default_factory=list)
    missing: int = 0


@dataclass(frozen=True)
class Task:
    """One unit in one pass of its job."""

    running: Running
    unit: Unit
    index: int
    phase: Literal["all", "sample", "statistics", "apply", "copy"]


class Queue:
    """Hands out units in file order; the next pass of a started job goes before anything new."""

    def __init__(
        self, ops: Sequence[Op], jobs: Sequence[Job], slot: int, program: Callable[[Job], Program], store: Store
    ) -> None:
        self._program = program
        self._store = store
        self._sample = functools.partial(sample_units, ops, slot=slot)
        self._fresh = self._first(jobs)
        self._ready: list[tuple[int, int, Task]] = []  # a heap: the earliest job first, whose inputs take memory
        self._number = itertools.count()
        self._waiting = 0
        self._condition = threading.Condition()
        self.error: BaseException | None = None

    def _first(self, jobs: Sequence[Job]) -> Iterator[Task]:
        for job in jobs:
            if all(self._store.done(job, u) for u in job.units):
                continue
            running = Running(job)
            if job.copy or job.resident:
                yield Task(running, job.units[0], 0, "copy" if job.copy else "all")
            else:
                running.program = self._program(job)
                yield from self._pass(running)

    def _pass(self, running: Running) -> list[Task]:
        """The units of the pass that is due."""
        program, job = running.program, running.job
        assert program is not None
        if program.ready:  # from the end, which was read last
            last = len(job.units) - 1
            return [Task(running, job.units[i], i, "apply") for i in range(last, -1, -1) if self._open(job, i)]
        pieces = program.pieces()
        units = job.units if pieces is None else tuple(self._sample(job, pieces.tolist()))
        running.partials = []
        running.missing = len(units)
        self._waiting += 1
        return [Task(running, u, i, "statistics" if pieces is None else "sample") for i, u in enumerate(units)]

    def _open(self, job: Job, unit: int) -> bool:
        """Whether a unit is still to be stored."""
        return not self._store.done(job, job.units[unit])

    def take(self) -> Task | None:
        """The next task, or None when there is nothing left or the run was stopped."""
        with self._condition:
            while self.error is None:
                if self._ready:
                    return heapq.heappop(self._ready)[2]
                task = next(self._fresh, None)
                if task is not None:
                    return task
                if self._waiting == 0:
                    return None
                self._condition.wait()
            return None

    def deposit(self, task: Task, partial: Any) -> None:
        """Accepts a partial result; the last one of a pass solves it and queues the next pass."""
        running = task.running
        with self._condition:
            running.partials.append((task.index, partial))
            running.missing -= 1
            if running.missing:
                return
        assert running.program is not None
        partials = [p for _, p in sorted(running.partials, key=lambda item: item[0])]
        running.partials = []
        running.program.advance(partials)
        with self._condition:
            self._waiting -= 1
            for due in self._pass(running):
                heapq.heappush(self._ready, (due.unit.job, next(self._number), due))
            self._condition.notify_all()

    def stop(self, error: BaseException) -> None:
        """Ends the run: the first error wins; workers finish the unit in hand."""
        with self._condition:
            if self.error is None:
                self.error = error
            self._condition.notify_all()


def cut(segments: Segments, pieces: I64) -> Segments:
    """The given (group, e0, length) pieces of whole tensors that are already in memory."""
    table = segments.table
    row_of = np.zeros(int(table[:, GROUP].max(initial=-1)) + 1, np.int64)
    row_of[table[:, GROUP]] = np.arange(len(table))
    out = table[row_of[pieces[:, 0]]].copy()
    shift = pieces[:, 1] - out[:, E0]
    out[:, OUT] = 0
    out[:, LENGTH] = pieces[:, 2]
    out[:, E0] = pieces[:, 1]
    steps = segments.steps
    out[:, HEADER : HEADER + len(steps)] += shift[:, None] * np.array(steps, np.int64)
    out[:, HEADER + len(steps) :] = 0
    return segments.pieces(out, np.zeros(len(out), np.int64))


def compute(program: Program, segments: Segments) -> None:
    """All passes over tensors that are in memory whole, on a device without the host in between."""
    bound = program.bind(segments)
    if bound is not None:
        bound.run()
        bound.check()
        return
    if not program.ready:
        program.resident(segments)
    while not program.ready:
        pieces = program.pieces()
        program.advance([program.statistics(segments if pieces is None else cut(segments, pieces))])
    program.apply(segments)
