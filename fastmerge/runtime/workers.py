"""The only owner of threads: workers that run a schedule, and short-lived ones for the same work on many things."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any, TypeVar

from fastmerge.errors import Interrupted
from fastmerge.ops.program import Program
from fastmerge.ops.segments import Segments
from fastmerge.ops.sources import all_spared
from fastmerge.ops.spec import Op
from fastmerge.runtime.devices import Buffer, Device
from fastmerge.runtime.schedule import Job
from fastmerge.runtime.stream import ProgramFactory, Queue, Stats, Store, Task, compute

SYNC_SECONDS = 2.0
"""How much finished work a kill can cost."""

T = TypeVar("T")
R = TypeVar("R")


def each(work: Callable[[T], R], items: Sequence[T], *, threads: int | None = None, name: str) -> list[R]:
    """``work`` of each item, side by side; the first error is raised once all have ended.

    Args:
        work: called in a thread of its own.
        items: what it is called with.
        threads: at most so many at a time; None for one per item.
        name: of the threads.
    """
    if len(items) < 2 and threads != 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads or len(items), thread_name_prefix=f"fastmerge-{name}") as pool:
        return [done.result() for done in [pool.submit(work, item) for item in items]]


class Runner:
    """Runs one schedule to its end, or until the first error."""

    def __init__(
        self,
        ops: Sequence[Op],
        jobs: Sequence[Job],
        store: Store,
        devices: Sequence[Device],
        program: ProgramFactory,
        *,
        slot: int = 0,
    ) -> None:
        """Takes what there is to do and who does it.

        Args:
            ops: the plan's.
            jobs: their schedule.
            store: where inputs come from and results go.
            devices: one worker each.
            program: makes the program of the ops of a job.
            slot: bytes of each worker's slot.
        """
        self._ops = ops
        self._slot = slot
        self._store = store
        self._devices = devices
        self._factory = program
        self._spared = all_spared(ops)
        self._alone = len(devices) == 1 or sum(len(j.units) for j in jobs) == 1
        self.stats = Stats()
        self._queue = Queue(ops, jobs, slot, self._make, store)

    def _make(self, job: Job) -> Program:
        return self._factory([self._ops[o] for o in job.ops])

    def run(self, *, progress: Callable[[Stats], None] | None = None) -> Stats:
        """Works until everything is stored; on the calling thread where one worker has all the work.

        Raises:
            Interrupted: after SIGINT, SIGTERM or SIGHUP; what is stored has been synced.
            FastMergeError: the first error of any worker; the others have stopped.
        """
        if not self._store.durable and self._alone:
            self._work(self._devices[0])
        else:
            self._threads(progress)
        if self._queue.error is not None:
            raise self._queue.error
        return self.stats

    def _threads(self, progress: Callable[[Stats], None] | None) -> None:
        workers = [
            threading.Thread(target=self._work, args=(d,), name=f"fastmerge-{d.name}", daemon=True)
            for d in self._devices
        ]
        over = threading.Event()
        syncer = threading.Thread(target=self._sync, args=(over,), name="fastmerge-sync", daemon=True)
        started: list[threading.Thread] = []
        with _signals(self._queue):
            try:
                for thread in (*workers, syncer) if self._store.durable else workers:
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

    def _sync(self, over: threading.Event) -> None:
        while not over.wait(SYNC_SECONDS):
            try:
                self._store.sync()
            except Exception as error:  # noqa: BLE001  any failure to persist ends the run
                self._queue.stop(error)
                return

    def _work(self, device: Device) -> None:
        try:
            buffer = device.allocate(self._slot)
            while (task := self._queue.take()) is not None:
                self._run_task(task, device, buffer)
        except BaseException as error:  # noqa: BLE001  handed to the main thread, which raises it
            self._queue.stop(error)

    def _run_task(self, task: Task, device: Device, buffer: Buffer) -> None:
        job, unit = task.running.job, task.unit
        t0 = time.perf_counter()
        if task.phase == "copy":
            self._store.copy(unit)
            written = sum(nbytes * len(self._ops[o].targets) for o, _, nbytes in unit.pieces)
            self.stats.add(write=time.perf_counter() - t0, bytes_written=written, units=1)
            return
        fresh = self._store.reads(unit)
        host = self._store.load(job, unit, buffer, again=task.phase == "statistics")
        t1 = time.perf_counter()
        partial = device.run(self._compute, task, device, host)
        t2 = t3 = time.perf_counter()
        statistics = task.phase in ("sample", "statistics")
        if statistics:
            self._queue.deposit(task, partial)
        else:
            self._store.store(unit, host)
            t3 = time.perf_counter()
        elements = sum([length for _, _, length in unit.pieces])
        less = [0.0, 0.0]  # than elements take in the slot
        for o, _, length in unit.pieces if self._spared else ():
            for i, nbytes in enumerate(self._spared.get(o, ())):
                less[i] += nbytes * length / self._ops[o].spec.numel
        self.stats.add(
            read=t1 - t0,
            compute=t2 - t1,
            write=t3 - t2,
            bytes_read=elements * sum([d.size for d in host.dtypes]) - less[0] if fresh else 0,
            bytes_written=0 if statistics else elements * host.outputs * host.out_dtype.size - less[1],
            units=1,
        )

    def _compute(self, task: Task, device: Device, host: Segments) -> Any:
        """What the device does for a task; gives the partial result of a statistics pass."""
        program = task.running.program or self._make(task.running.job)
        if program.on_host:
            return self._on_host(task, program, host)
        segments = device.upload(host)
        if task.phase in ("sample", "statistics"):
            return program.statistics(segments)
        if task.phase == "apply":
            program.apply(segments)
        else:
            compute(program, segments)
        device.download(segments, host)
        return None

    @staticmethod
    def _on_host(task: Task, program: Program, host: Segments) -> Any:
        """The same for a program that works on host memory whatever the device is: a definition in plain torch."""
        if task.phase in ("sample", "statistics"):
            return program.statistics(host)
        compute(program, host)
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
