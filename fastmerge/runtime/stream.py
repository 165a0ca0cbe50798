"""Runs a schedule on devices: the only owner of threads.

Each worker takes the next unit in file order, reads its inputs into its own slot, lets the device compute,
and hands the result to the store. Jobs whose data does not fit one unit pass a barrier between passes: the
worker that brings the last partial result solves, and puts the units of the next pass in front.
"""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, Protocol

import numpy as np

from fastmerge.errors import Interrupted
from fastmerge.methods.base import HEADER, I64, Group, Program, Segments
from fastmerge.planning import Output
from fastmerge.runtime.devices import Buffer, Device
from fastmerge.runtime.schedule import Job, Schedule, Unit, sample_units

SYNC_SECONDS = 2.0
"""How much finished work a kill can cost."""


class Store(Protocol):
    """Where inputs come from and outputs go: files, or tensors that a caller owns."""

    def load(self, job: Job, unit: Unit, buffer: Buffer) -> Segments:
        """Brings the unit's inputs to addresses and assigns its output addresses."""

    def store(self, unit: Unit, segments: Segments) -> None:
        """Keeps the computed outputs of the unit."""

    def copy(self, unit: Unit) -> None:
        """Copies the byte ranges of a ``copy`` unit."""

    def done(self, job: Job, unit: Unit) -> bool:
        """Whether an earlier run already finished the unit."""

    def sync(self) -> None:
        """Makes what is stored durable."""


ProgramFactory = Callable[[Sequence[Output], Device], Program]


@dataclass
class Stats:
    """What the workers did, summed over all of them: seconds by stage, bytes, units."""

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    wait: float = 0.0
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
class _Running:
    """A job under way."""

    job: Job
    program: Program | None = None
    partials: list[tuple[int, Any]] = field(default_factory=list)
    missing: int = 0


@dataclass(frozen=True)
class _Task:
    running: _Running
    unit: Unit
    index: int
    phase: Literal["all", "statistics", "apply", "copy"]


class Queue:
    """Hands out units in file order; the next pass of a started job goes before anything new."""

    def __init__(
        self, outputs: Sequence[Output], schedule: Schedule, program: Callable[[Job], Program], store: Store
    ) -> None:
        self._program = program
        self._store = store
        self._sample = functools.partial(sample_units, outputs, slot_bytes=schedule.slot_bytes)
        self._fresh = self._first(schedule.jobs)
        self._ready: deque[_Task] = deque()
        self._waiting = 0
        self._condition = threading.Condition()
        self.error: BaseException | None = None

    def _first(self, jobs: Sequence[Job]) -> Iterator[_Task]:
        for job in jobs:
            if all(self._store.done(job, u) for u in job.units):
                continue
            running = _Running(job)
            if job.kind == "copy" or job.resident:
                yield _Task(running, job.units[0], 0, "copy" if job.kind == "copy" else "all")
            else:
                running.program = self._program(job)
                yield from self._pass(running)

    def _pass(self, running: _Running) -> list[_Task]:
        """The units of the pass that is due."""
        program, job = running.program, running.job
        assert program is not None
        if program.ready:
            return [_Task(running, u, i, "apply") for i, u in enumerate(job.units) if not self._store.done(job, u)]
        pieces = program.pieces()
        units = job.units if pieces is None else tuple(self._sample(job, pieces.tolist()))
        running.partials = []
        running.missing = len(units)
        self._waiting += 1
        return [_Task(running, u, i, "statistics") for i, u in enumerate(units)]

    def take(self) -> _Task | None:
        """The next task, or None when there is nothing left or the run was stopped."""
        with self._condition:
            while self.error is None:
                if self._ready:
                    return self._ready.popleft()
                task = next(self._fresh, None)
                if task is not None:
                    return task
                if self._waiting == 0:
                    return None
                self._condition.wait()
            return None

    def deposit(self, task: _Task, partial: Any) -> None:
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
            self._ready.extend(self._pass(running))
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
    row_of = np.zeros(int(table[:, 5].max(initial=-1)) + 1, np.int64)
    row_of[table[:, 5]] = np.arange(len(table))
    out = table[row_of[pieces[:, 0]]].copy()
    shift = pieces[:, 1] - out[:, 2]
    out[:, 0] = 0
    out[:, 1] = pieces[:, 2]
    out[:, 2] = pieces[:, 1]
    out[:, HEADER:] += shift[:, None] * np.array([d.size for d in segments.dtypes], np.int64)
    return Segments(out, segments.dtypes, segments.out_dtype, np.zeros(len(out), np.int64))


def compute(program: Program, segments: Segments, host: Segments, native: Any) -> None:
    """All passes over groups that are in memory whole.

    Args:
        program: of these groups.
        segments: where the program's kernels run.
        host: the same in host memory.
        native: kernels that run there; None where there are none.
    """
    if native is not None and not program.ready:
        program.settle(host, native)
    while not program.ready:
        pieces = program.pieces()
        program.advance([program.statistics(segments if pieces is None else cut(segments, pieces))])
    program.apply(segments)


def segment_row(out: int, length: int, e0: int, group: Group, index: int, inputs: Sequence[int]) -> list[int]:
    """One row of a segment table; the key is stored as the bits of a signed integer."""
    key = group.key
    key -= (key >> 63) << 64
    return [out, length, e0, group.row, key, index, 0, *inputs]


class Runner:
    """Runs one schedule to its end, or until the first error."""

    def __init__(
        self,
        outputs: Sequence[Output],
        schedule: Schedule,
        store: Store,
        devices: Sequence[Device],
        program: ProgramFactory,
    ) -> None:
        self._outputs = outputs
        self._schedule = schedule
        self._store = store
        self._devices = devices[: schedule.slots]
        self._factory = program
        self.stats = Stats()
        self._queue = Queue(outputs, schedule, lambda job: self._make(job, self._devices[0]), store)

    def _make(self, job: Job, device: Device) -> Program:
        return self._factory([self._outputs[o] for o in job.outputs], device)

    def run(self, *, progress: Callable[[Stats], None] | None = None) -> Stats:
        """Works until everything is stored.

        Raises:
            Interrupted: after SIGINT, SIGTERM or SIGHUP; what is stored has been synced.
            FastMergeError: the first error of any worker; the others have stopped.
        """
        workers = [
            threading.Thread(target=self._work, args=(d,), name=f"fastmerge-{d.name}", daemon=True)
            for d in self._devices
        ]
        over = threading.Event()
        syncer = threading.Thread(target=self._sync, args=(over,), name="fastmerge-sync", daemon=True)
        started: list[threading.Thread] = []
        with _signals(self._queue):
            try:
                for thread in (*workers, syncer):
                    thread.start()
                    started.append(thread)
                for thread in workers:
                    while thread.is_alive():
                        thread.join(0.05)
                        if progress is not None:
                            progress(self.stats)
            except BaseException as error:
                self._queue.stop(error)
                raise
            finally:
                # Whatever happens, nobody reads or writes after the caller has closed files and freed tensors.
                over.set()
                for thread in started:
                    thread.join()
        if self._queue.error is not None:
            raise self._queue.error
        return self.stats

    def _sync(self, over: threading.Event) -> None:
        while not over.wait(SYNC_SECONDS):
            try:
                self._store.sync()
            except Exception as error:  # noqa: BLE001  any failure to persist ends the run
                self._queue.stop(error)
                return

    def _work(self, device: Device) -> None:
        try:
            buffer = device.allocate(self._schedule.slot_bytes)
            while (task := self._queue.take()) is not None:
                self._run_task(task, device, buffer)
        except BaseException as error:  # noqa: BLE001  handed to the main thread, which raises it
            self._queue.stop(error)

    def _run_task(self, task: _Task, device: Device, buffer: Buffer) -> None:
        job, unit = task.running.job, task.unit
        t0 = time.perf_counter()
        if task.phase == "copy":
            self._store.copy(unit)
            self.stats.add(write=time.perf_counter() - t0, bytes_written=sum(p[2] for p in unit.pieces), units=1)
            return
        host = self._store.load(job, unit, buffer)
        t1 = time.perf_counter()
        partial = device.run(lambda: self._compute(task, device, host))
        t2 = t3 = time.perf_counter()
        if task.phase == "statistics":
            self._queue.deposit(task, partial)
        else:
            self._store.store(unit, host)
            t3 = time.perf_counter()
        elements = sum([length for _, _, length in unit.pieces])
        self.stats.add(
            read=t1 - t0,
            compute=t2 - t1,
            write=t3 - t2,
            bytes_read=elements * sum([d.size for d in host.dtypes]),
            bytes_written=0 if task.phase == "statistics" else elements * host.out_dtype.size,
            units=1,
        )

    def _compute(self, task: _Task, device: Device, host: Segments) -> Any:
        """What the device does for a task; gives the partial result of a statistics pass."""
        segments = device.upload(host)
        if task.phase == "statistics":
            assert task.running.program is not None
            return task.running.program.statistics(segments)
        program = task.running.program or self._make(task.running.job, device)
        compute(program, segments, host, device.native)
        device.download(segments, host)
        return None


class _signals:  # noqa: N801  a context manager used like a function
    """Turns SIGINT, SIGTERM and SIGHUP into a graceful stop; a second one acts as usual."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._old: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup, background jobs, foreign handlers
                    self._old[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        error = Interrupted(f"stopped by {signal.Signals(number).name}; continue with --resume")
        error.exit_code = 128 + number
        self._queue.stop(error)
        signal.signal(number, self._old[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
