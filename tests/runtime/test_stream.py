"""The stream by property: any devices, unit sizes and timings give the same bytes; faults end it cleanly."""

import ctypes
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.dtypes import F32
from fastmerge.errors import FastMergeError, Interrupted
from fastmerge.methods.base import TILE, Group, Program
from fastmerge.planning import Output
from fastmerge.runtime import schedule as scheduling
from fastmerge.runtime.devices import CpuDevice
from fastmerge.runtime.devices.fake import FakeDevice
from fastmerge.runtime.schedule import schedule
from fastmerge.runtime.stores import MemoryStore
from fastmerge.runtime.stream import Runner
from tests.compare import differences


def view(address, n):
    return np.frombuffer((ctypes.c_float * n).from_address(address), np.float32)


class Sums(Program):
    """A program of three passes: a sample, the sum of everything, then ``out = x - y + sum + sample``.

    Values are small integers, so every order of adding gives the same floats, and a unit that was lost,
    doubled or read too early shows.
    """

    def __init__(self, groups, passes):
        self.groups, self.passes, self.step = groups, passes, 0
        self.sample = np.zeros(len(groups))
        self.total = np.zeros(len(groups))

    @property
    def ready(self):
        return self.step == self.passes

    def pieces(self):
        if self.step == 0 and self.passes == 2:
            return np.array(
                [[g, (group.numel // 2), min(3, group.numel - group.numel // 2)] for g, group in enumerate(self.groups)]
            )
        return None

    def statistics(self, segments):
        return [(int(r[5]), float(view(int(r[7]), int(r[1])).sum()), int(r[1])) for r in segments.table]

    def advance(self, partials):
        into = self.sample if self.step == 0 and self.passes == 2 else self.total
        seen = np.zeros(len(self.groups))
        for partial in partials:
            for group, value, length in partial:
                into[group] += value
                seen[group] += length
        if into is self.total:
            assert list(seen) == [g.numel for g in self.groups], "a pass must see every element once"
        self.step += 1

    def apply(self, segments):
        assert self.ready
        for r in segments.table:
            n = int(r[1])
            add = self.total[int(r[5])] + self.sample[int(r[5])]
            view(int(r[0]), n)[:] = view(int(r[7]), n) - view(int(r[8]), n) + np.float32(add)


class Toy:
    """Stands for a method class."""

    def __init__(self, scope, passes):
        self.kind, self.passes = scope, passes

    def scope(self, group):
        return self.kind

    def program(self, groups, kernels):
        return Sums(groups, self.passes)


def problem(specs, seed=0):
    """Outputs, inputs, and the results that are expected."""
    rng = np.random.default_rng(seed)
    outputs, inputs, expected = [], [], []
    whole = {}
    for i, (n, scope, passes) in enumerate(specs):
        toy = whole.setdefault((scope, passes), Toy(scope, passes))
        group = Group(
            name=str(i),
            shape=(n,),
            dtypes=(F32, F32),
            out_dtype=F32,
            params={},
            models=({}, {}),
            has_base=False,
            indices=(0, 1),
        )
        x, y = (rng.integers(-8, 8, n).astype(np.float32) for _ in range(2))
        outputs.append(Output(name=str(i), dtype=F32, shape=(n,), models=(), inputs=(), method=toy, group=group))
        inputs.append((x, y))
        add = x.sum() if passes else 0
        add += x[n // 2 : n // 2 + 3].sum() if passes == 2 else 0
        expected.append(x - y + np.float32(add))
    return outputs, inputs, expected


def factory(outs, device):
    return outs[0].method.program([o.group for o in outs], device.kernels)


def run(outputs, inputs, devices, elements):
    results = [np.full(max(o.group.numel, 1), np.nan, np.float32) for o in outputs]
    old = scheduling.UNIT_ELEMENTS
    scheduling.UNIT_ELEMENTS = elements
    try:
        work = replace(schedule(outputs, workers=len(devices), memory=None), slot_bytes=0)
    finally:
        scheduling.UNIT_ELEMENTS = old
    store = MemoryStore(outputs, [[a.ctypes.data for a in row] for row in inputs], [r.ctypes.data for r in results])
    runner = Runner(outputs, work, store, devices, factory)
    runner.run()
    return [r[: o.group.numel] for r, o in zip(results, outputs, strict=True)]


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
    outputs, inputs, expected = problem(spec, seed)
    before = [[a.copy() for a in row] for row in inputs]
    devices = [FakeDevice(None, name=f"fake:{i}", latency=0.002, seed=seed + i) for i in range(workers)]
    assert differences(run(outputs, inputs, devices, elements), expected) == []
    for row, old in zip(inputs, before, strict=True):
        assert differences(row, old) == [], "an input was written to"


def test_a_whole_model_job_passes_one_barrier():
    outputs, inputs, _ = problem([(TILE * 3, "model", 1), (10, "model", 1), (TILE, "model", 1)])
    devices = [FakeDevice(None, name=f"fake:{i}", latency=0.001) for i in range(3)]
    want = [x - y + np.float32(x.sum()) for x, y in inputs]
    assert differences(run(outputs, inputs, devices, TILE), want) == []


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_the_first_fault_ends_the_run_and_every_thread(fail_at):
    outputs, inputs, _ = problem([(TILE * 6, "tensor", 2)] * 3)
    devices = [FakeDevice(None, name=f"fake:{i}", latency=0.001, fail_at=fail_at if i == 1 else -1) for i in range(3)]
    with pytest.raises(FastMergeError, match="fake:1: injected fault"):
        run(outputs, inputs, devices, TILE)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastmerge-")]


def test_a_fault_while_solving_ends_the_run(monkeypatch):
    outputs, inputs, _ = problem([(TILE * 4, "tensor", 1)])
    monkeypatch.setattr(Sums, "advance", lambda self, partials: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(outputs, inputs, [CpuDevice(None), CpuDevice(None)], TILE)


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
def test_signals_stop_gracefully_within_seconds(number, default_signals):
    outputs, inputs, _ = problem([(TILE * 40, "element", 0)])
    slow = [FakeDevice(None, name=f"fake:{i}", latency=0.2) for i in range(2)]
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    started = time.monotonic()
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Interrupted) as caught:
        run(outputs, inputs, slow, TILE)
    assert caught.value.exit_code == 128 + number
    assert time.monotonic() - started < 5
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_ignored_signals_stay_ignored(default_signals):
    outputs, inputs, expected = problem([(TILE, "element", 0)])
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGHUP)).start()
        got = run(outputs, inputs, [FakeDevice(None, latency=0.2)], TILE)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)
    assert differences(got, expected) == []


def test_no_worker_outlives_a_failing_progress_display(monkeypatch):
    outputs, inputs, _ = problem([(TILE * 20, "element", 0)])
    whole = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self: whole(self, progress=lambda stats: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        run(outputs, inputs, [FakeDevice(None, name=f"fake:{i}", latency=0.05) for i in range(2)], TILE)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastmerge-")]
