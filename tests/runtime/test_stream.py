"""The stream by property: any devices, unit sizes and timings give the same bytes; faults end it cleanly."""

import ctypes
import os
import signal
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.dtypes import F32
from fastmerge.errors import FastMergeError, Interrupted
from fastmerge.ops.program import Program
from fastmerge.ops.segments import TILE
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Spec
from fastmerge.runtime import workers as workers_module
from fastmerge.runtime.devices import CpuDevice
from fastmerge.runtime.schedule import schedule
from fastmerge.runtime.stores import OpStore
from fastmerge.runtime.stream import Queue
from fastmerge.runtime.workers import Runner
from tests.compare import differences
from tests.runtime import ops as toys
from tests.runtime.fake_device import FakeDevice


def view(address, n):
    return np.frombuffer((ctypes.c_float * n).from_address(address), np.float32)


class Sums(Program):
    """A program of three passes: a sample, the sum of everything, then ``out = x - y + sum + sample``.

    Values are small integers, so every order of adding gives the same floats, and a unit that was lost,
    doubled or read too early shows.
    """

    def __init__(self, ops, passes):
        self.ops, self.passes, self.step = ops, passes, 0
        self.sample = np.zeros(len(ops))
        self.total = np.zeros(len(ops))

    @property
    def ready(self):
        return self.step == self.passes

    def pieces(self):
        if self.step == 0 and self.passes == 2:
            sizes = [op.spec.numel for op in self.ops]
            return np.array([[g, n // 2, min(3, n - n // 2)] for g, n in enumerate(sizes)])
        return None

    def statistics(self, segments):
        return [(int(r[5]), float(view(int(r[7]), int(r[1])).sum()), int(r[1])) for r in segments.table]

    def advance(self, partials):
        into = self.sample if self.step == 0 and self.passes == 2 else self.total
        seen = np.zeros(len(self.ops))
        for partial in partials:
            for group, value, length in partial:
                into[group] += value
                seen[group] += length
        if into is self.total:
            assert list(seen) == [op.spec.numel for op in self.ops], "a pass must see every element once"
        self.step += 1

    def apply(self, segments):
        assert self.ready
        for r in segments.table:
            n = int(r[1])
            add = self.total[int(r[5])] + self.sample[int(r[5])]
            view(int(r[0]), n)[:] = view(int(r[7]), n) - view(int(r[8]), n) + np.float32(add)


class Toy(toys.Toy):
    """Stands for a method that has a program."""

    def __init__(self, grain, passes):
        super().__init__(grain)
        self.passes = self.words = passes


def problem(specs, seed=0):
    """Ops, inputs, results, and what they should be."""
    rng = np.random.default_rng(seed)
    ops, inputs, results, expected = [], [], [], []
    for i, (n, grain, passes) in enumerate(specs):
        x, y = (rng.integers(-8, 8, n).astype(np.float32) for _ in range(2))
        out = np.full(n, np.nan, np.float32)
        sources, target = (tuple(Memory(a.ctypes.data, F32, (n,)) for a in some) for some in ((x, y), (out,)))
        ops.append(Op(str(i), Spec(Toy(grain, passes), (n,), (F32, F32), F32), 0, sources, target))
        inputs.append((x, y))
        results.append(out)
        add = x.sum() if passes else 0
        add += x[n // 2 : n // 2 + 3].sum() if passes == 2 else 0
        expected.append(x - y + np.float32(add))
    return ops, inputs, results, expected


class Durable(OpStore):
    """Results in memory that pretend to need a sync, as those in files do."""

    durable = True
    synced = 0

    def sync(self):
        self.synced += 1


def run(ops, devices, elements):
    jobs = schedule(ops, elements=elements)
    Runner(ops, jobs, OpStore(ops), devices, lambda some: Sums(some, some[0].spec.method.passes)).run()


specs = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 5, 1000, TILE, TILE + 1, 5 * TILE + 7]),
        st.sampled_from(["element", "tensor"]),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(specs, st.integers(1, 5), st.sampled_from([TILE, 2 * TILE, 8 * TILE]), st.integers(0, 10**6))
def test_any_devices_chunks_and_timings_give_the_same_result(spec, workers, elements, seed):
    spec = [(n, "tensor" if passes else scope, passes) for n, scope, passes in spec]
    ops, inputs, results, expected = problem(spec, seed)
    before = [[a.copy() for a in row] for row in inputs]
    devices = [FakeDevice(name=f"fake:{i}", latency=0.002, seed=seed + i) for i in range(workers)]
    run(ops, devices, elements)
    assert differences(results, expected) == []
    for row, old in zip(inputs, before, strict=True):
        assert differences(row, old) == [], "an input was written to"


def test_the_earliest_job_goes_first_as_what_it_read_takes_memory():
    ops, *_ = problem([(3 * TILE, "tensor", 2), (3 * TILE, "tensor", 2)])
    jobs = schedule(ops, elements=TILE)
    queue = Queue(ops, jobs, 0, lambda job: Sums([ops[o] for o in job.ops], 2), OpStore(ops))
    samples = [queue.take(), queue.take()]
    for task in reversed(samples):  # the second job is ahead
        queue.deposit(task, [(0, 0.0, 3)])
    taken = [(task.unit.job, task.phase) for task in [queue.take() for _ in range(3)]]
    assert [task.unit.job for task in samples] == [0, 1]
    assert taken == [(0, "statistics")] * 3


def test_a_whole_model_job_passes_one_barrier():
    ops, _, results, expected = problem([(TILE * 3, "model", 1), (10, "model", 1), (TILE, "model", 1)])
    run(ops, [FakeDevice(name=f"fake:{i}", latency=0.001) for i in range(3)], TILE)
    assert differences(results, expected) == []


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_the_first_fault_ends_the_run_and_every_thread(fail_at):
    ops, *_ = problem([(TILE * 6, "tensor", 2)] * 3)
    devices = [FakeDevice(name=f"fake:{i}", latency=0.001, fail_at=fail_at) for i in range(3)]  # whoever comes so far
    with pytest.raises(FastMergeError, match="fake:[012]: injected fault"):
        run(ops, devices, TILE)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastmerge-")]


def test_a_fault_while_solving_ends_the_run(monkeypatch):
    ops, *_ = problem([(TILE * 4, "tensor", 1)])
    monkeypatch.setattr(Sums, "advance", lambda self, partials: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(ops, [CpuDevice(), CpuDevice()], TILE)


@pytest.fixture
def default_signals():
    """What a shell gives; a process in the background may have inherited ignored ones."""
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    old = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_gracefully_after_the_units_in_hand(number, default_signals):
    ops, *_ = problem([(TILE * 40, "element", 0)])
    slow = [FakeDevice(name=f"fake:{i}", latency=0.2) for i in range(2)]
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Interrupted) as caught:
        run(ops, slow, TILE)
    assert caught.value.exit_code == 128 + number
    assert sum(device.uploads for device in slow) < 40 // 2, "units that were not in hand were begun"
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_ignored_signals_stay_ignored(default_signals):
    ops, _, results, expected = problem([(TILE * 2, "element", 0)])
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGHUP)).start()
        run(ops, [FakeDevice(name=f"fake:{i}", latency=0.2) for i in range(2)], TILE)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)
    assert differences(results, expected) == []


def test_no_worker_outlives_a_failing_progress_display(monkeypatch):
    ops, *_ = problem([(TILE * 20, "element", 0)])
    whole = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self: whole(self, progress=lambda stats: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        run(ops, [FakeDevice(name=f"fake:{i}", latency=0.05) for i in range(2)], TILE)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastmerge-")]


@pytest.fixture
def no_threads(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("a thread was started"))


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_one_worker_stays_on_the_callers_thread(no_threads, passes):
    ops, _, results, expected = problem([(TILE * 5, "tensor" if passes else "element", passes), (7, "element", 0)])
    run(ops, [CpuDevice()], TILE)
    assert differences(results, expected) == []


def test_one_unit_stays_on_the_callers_thread_whatever_workers_there_are(no_threads):
    ops, _, results, expected = problem([(TILE, "tensor", 2)])
    run(ops, [CpuDevice() for _ in range(4)], TILE)
    assert differences(results, expected) == []


def test_an_error_on_the_callers_thread_is_the_same_error(no_threads):
    ops, *_ = problem([(TILE, "element", 0)])
    with pytest.raises(FastMergeError, match="fake:0: injected fault"):
        run(ops, [FakeDevice(fail_at=0)], TILE)


def test_what_must_be_durable_is_synced_beside_the_work(monkeypatch):
    """So that a signal ends it, and a kill costs little, even with one worker and one unit."""
    monkeypatch.setattr(workers_module, "SYNC_SECONDS", 0.01)
    ops, _, results, expected = problem([(TILE, "element", 0)])
    store = Durable(ops)
    jobs = schedule(ops, elements=TILE)
    Runner(ops, jobs, store, [FakeDevice(latency=0.5, seed=3)], lambda some: Sums(some, 0)).run()
    assert store.synced > 0
    assert differences(results, expected) == []
