"""``make gpu`` in one short call: order, shares of the budget, what is cut off and goes on; with stand-ins."""

import functools
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the GPU benches need torch")
pytest.importorskip("triton", reason="the GPU benches need triton")

from bench.gpu import bars, calls, data, profiled, runner, table, tests, timing
from bench.gpu.plan import PARTS, Absent, Context, Cut, Item, Turn, items
from bench.gpu.state import IDENTITY, State
from bench.gpu.worker import perform

FACTS = dict.fromkeys(IDENTITY, "x") | {"dry": False, "date": "today", "command": "make gpu", "gpu": "H200"}
BUDGET = 240.0
LIMIT = 60.0


class Machine:
    """A clock that items move, and workers that take as long as they are said to."""

    def __init__(self, path, monkeypatch, takes):
        self.now = 0.0
        self.takes = takes
        self.log = []
        self.started = 0
        self.state = State.open(path, FACTS, fresh=False)
        self.context = Context(dry=False, wheels=None, cache=str(path))
        machine = self

        class Worker:
            start = 0.0

            def __init__(self, context):
                self.alive = True
                machine.started += 1

            def perform(self, part, item, seconds, kept=None):
                return machine.perform(self, part, item, seconds, kept)

            def stop(self):
                self.alive = False

        monkeypatch.setattr(runner, "Worker", Worker)
        monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(runner, "items", lambda part, context: self.items(part))

    def items(self, part):
        return [Item(name, dict, needs=2, limit=LIMIT, stops=part == "tests") for name in self.takes[part]]

    def perform(self, worker, part, item, seconds, kept):
        takes = self.takes[part][item.name] - (kept or 0)
        self.log.append((round(self.now), part, item.name, kept))
        self.now += min(takes, seconds)
        if takes <= seconds:
            return {"status": "ok", "row": {"share": 0.9}, "seconds": takes}
        worker.alive = False
        if item.stops:
            done = (kept or 0) + seconds
            return {"status": "cut", "reason": f"{done:.0f} of them", "row": {"passed": done}, "kept": done}
        return None

    def call(self, *, parts=tuple(PARTS), budget=BUDGET, spent=5.0, retry=False):
        self.log.clear()
        begin = self.now
        self.now += spent
        run = runner.Run(parts, self.context, self.state, retry=retry, say=lambda _: None)
        left = run.work(begin, budget)
        assert self.now - begin <= budget - runner.END + 1e-6 or not self.log
        return left

    def ran(self, part):
        return [name for _, p, name, _ in self.log if p == part]


def some(count, seconds):
    return {f"item {i}": seconds for i in range(count)}


USUAL = {
    "build": {"packages": 6.0, "extension": 35.0},
    "tests": {tests.ITEM: 50.0},
    "calls": some(20, 3.0),
    "kernels": some(15, 2.0),
    "merges": some(2, 10.0),
    "tune": some(9, 4.0),
    "sanitize": some(3, 7.0),
}


def test_bits_then_calls_then_kernels_then_what_fits(tmp_path, monkeypatch):
    assert list(PARTS) == ["build", "tests", "calls", "kernels", "merges", "tune", "sanitize"]
    machine = Machine(tmp_path, monkeypatch, USUAL)
    left = machine.call()
    order = [part for _, part, _, _ in machine.log]
    assert order == sorted(order, key=list(PARTS).index)
    assert all(len(machine.ran(part)) == len(USUAL[part]) for part in ("build", "tests", "calls", "kernels", "merges"))
    there = {part: {*machine.state.results.get(part, {})} for part in PARTS}
    assert left == sum(map(len, USUAL.values())) - sum(map(len, there.values()))
    assert 0 < len(there["tune"]) < 9
    assert machine.started == 1, "one process, while nothing fails"
    assert machine.call() == 0
    assert all(name not in there[part] for _, part, name, _ in machine.log), "what is there stays"


def test_tests_that_take_too_long_leave_the_others_their_shares(tmp_path, monkeypatch):
    machine = Machine(
        tmp_path, monkeypatch, USUAL | {"build": {}, "tests": {tests.ITEM: 1000.0}, "calls": some(80, 3.0)}
    )
    monkeypatch.setattr(Machine, "items", lambda self, part: [
        Item(n, dict, needs=2, limit=450 if part == "tests" else LIMIT, stops=part == "tests") for n in self.takes[part]
    ])  # fmt: skip
    assert machine.call() > 0
    began = {part: min((t for t, p, _, _ in machine.log if p == part), default=None) for part in PARTS}
    end = BUDGET - runner.END
    assert began["calls"] - began["tests"] <= 0.375 * BUDGET + 1
    assert began["kernels"] - began["calls"] >= 0.3 * BUDGET - 3
    assert began["kernels"] >= end - 0.15 * BUDGET - 3
    assert len(machine.ran("kernels")) == 15
    assert began["merges"] is None
    entry = machine.state.entry("tests", tests.ITEM)
    assert entry["status"] == "cut"
    kept = entry["kept"]
    assert not machine.state.known("tests", tests.ITEM)
    machine.call()
    assert machine.log[0][1:] == ("tests", tests.ITEM, kept), "the next call goes on with what was kept"
    machine.takes["tests"][tests.ITEM] = 100.0
    machine.call()
    assert machine.state.known("tests", tests.ITEM)


def test_what_is_cut_off_is_killed_and_begun_anew_and_what_hangs_has_failed(tmp_path, monkeypatch):
    takes = {part: {} for part in PARTS} | {
        "calls": {"quick": 3.0, "hangs": 1e6, "slow": 50.0},
        "kernels": some(2, 3.0),
    }
    machine = Machine(tmp_path, monkeypatch, takes)
    assert machine.call(budget=60) == 2
    assert machine.state.entry("calls", "hangs") is None, "the budget ended it, not its own limit"
    assert machine.ran("kernels") == ["item 0", "item 1"]
    assert machine.call() == 0
    assert machine.state.entry("calls", "hangs") == {"status": "failed", "reason": "took longer than 60 s"}
    assert machine.state.row("calls", "slow")
    machine.takes["calls"]["hangs"] = 4.0
    assert machine.call() == 0
    assert not machine.log
    assert machine.call(retry=True) == 0
    assert machine.ran("calls") == ["hangs"]
    machine.takes["calls"]["quick"] = 1e6
    machine.state.record("calls", "quick", {"status": "failed", "reason": "so"})
    assert machine.call(retry=True) == 0
    assert machine.ran("calls") == ["quick"], "once a call"


def test_nothing_runs_before_all_is_built(tmp_path, monkeypatch):
    machine = Machine(tmp_path, monkeypatch, USUAL)
    machine.call(budget=30)
    assert {part for _, part, _, _ in machine.log} == {"build"}
    machine.call(budget=60)
    assert machine.ran("build") == ["extension"]
    assert [part for _, part, _, _ in machine.log][1] == "calls", "no time for the tests beside the shares of the rest"


def test_parts_without_a_share_have_the_whole_budget(tmp_path, monkeypatch):
    machine = Machine(tmp_path, monkeypatch, USUAL | {"merges": some(8, 25.0)})
    assert machine.call(parts=("merges", "tune"), budget=250) == 0
    assert machine.call(parts=("tests",), budget=50) == 1
    assert machine.state.entry("tests", tests.ITEM)["kept"] == 50 - 5 - runner.END
    assert machine.call(parts=("tests",), budget=50) == 0


def test_a_turn_has_its_time_and_a_cut_has_a_line(tmp_path):
    asked = []

    def run(turn):
        asked.append(turn)
        raise Cut("2 of 5 tests passed", {"passed": 2}, ["a", "b"])

    answer = perform(Item("marked", run, stops=True), Turn(7.0, ["a"]))
    assert asked == [Turn(7.0, ["a"])]
    assert (answer["status"], answer["kept"]) == ("cut", ["a", "b"])
    assert runner.line(answer) == "cut: 2 of 5 tests passed"
    state = State.open(tmp_path, FACTS, fresh=False)
    state.record("tests", "marked", answer)
    assert "| marked | cut | 2 of 5 tests passed | 2 |" in table.page(state, "tests (1)")
    (verdict,) = [row["verdict"] for row in bars.judge(state) if "marked gpu" in row["bar"]]
    assert verdict == "not run"


def test_marked_tests_run_at_once_go_on_and_warnings_fail_none(tmp_path, monkeypatch):
    some = {"tests/gpu/test_gpu.py", "tests/kernels/test_replicate_gpu.py", "tests/kernels/test_triton.py"}
    assert some <= set(tests.files())
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nmarkers = gpu\n")
    test = tmp_path / "test_some.py"
    mark = "@pytest.mark" + ".gpu\n"
    test.write_text(
        "import os, time, warnings, pytest\nwarnings.warn('old driver', FutureWarning)\n"
        f"{mark}def test_one(): warnings.warn('old package', FutureWarning)\n"
        f"{mark}def test_two(): time.sleep(float(os.environ['FASTMERGE_TEST_SECONDS']))\n"
        f"{mark}def test_three(): assert 'FASTMERGE_TEST_GOOD' in os.environ, 'a bad bit'\n"
        "def test_four(): assert False\n"
    )
    find = tests.importlib.util.find_spec
    monkeypatch.setattr(tests.importlib.util, "find_spec", lambda name: None if name == "xdist" else find(name))
    here = Context(dry=False, wheels=None, cache=str(tmp_path))
    run = functools.partial(tests.marked, [str(test)], here)
    monkeypatch.setenv("FASTMERGE_TEST_SECONDS", "600")
    for seconds in (4.5, 8, 16, 32, 64, 128):  # until pytest has started in time
        with pytest.raises(Cut) as cut:
            run(Turn(seconds))
        if cut.value.kept:
            break
    assert str(cut.value) == "1 of 3 tests passed before the time was over"
    assert [name.rsplit("::")[-1] for name in cut.value.kept] == ["test_one"]
    monkeypatch.setenv("FASTMERGE_TEST_SECONDS", "0")
    with pytest.raises(tests.Failed, match="test_three: AssertionError: a bad bit") as failed:
        run(Turn(60, cut.value.kept))
    assert [name.rsplit("::")[-1] for name in failed.value.kept] == ["test_one", "test_two"]
    monkeypatch.setenv("FASTMERGE_TEST_GOOD", "1")
    row = run(Turn(60, failed.value.kept))
    assert (row["tests"], row["passed"], row["failed"]) == (3, 3, 0)
    assert "1 passed" in row["summary"]


def test_ours_come_first_then_eager_then_mergekit_then_compile(tmp_path):
    names = [item.name for item in items("calls", Context(dry=False, wheels=None, cache=str(tmp_path)))]
    peers = ("eager", "mergekit", "compile")
    first = next(i for i, name in enumerate(names) if name.endswith(peers))
    assert not [name for name in names[:first] if name.endswith(peers)]
    assert all(name.endswith(peers) for name in names[first:])
    assert {f"ties {kind}" for kind in data.KINDS} | {"profile ties", "profile slerp"} <= {*names[:first]}
    for name in calls.CALLS:
        assert [names.index(f"{name} {p}") for p in peers] == sorted(names.index(f"{name} {p}") for p in peers)
    assert len(names) == len({*names})
    model = calls.shapes(small=False)
    elements = sum(torch.Size(shape).numel() for shape in model.values())
    assert (len(model), round(elements / 1e9, 1)) == (147, 4.5)


def test_the_first_time_is_no_part_of_a_median(monkeypatch):
    bench = timing.Bench("cpu", 1 << 18, 3)
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def slow(first, later):
        seen = []

        def work(*_):
            clock[0] += later if seen else first
            seen.append(1)
            return torch.ones(4)

        return work

    monkeypatch.setattr(calls, "peer_of", lambda *_: slow(30.0, 0.5))
    monkeypatch.setattr(calls.Call, "ours", lambda self, inputs: slow(5.0, 0.25))
    row = calls.beside(bench, "ties", "compile")
    assert (row["times faster"], row["peer first ms"]) == (2.0, 30_000.0)
    assert row["largest difference"] == 0.0
    row = calls.alone(bench, "ties", "lattice")
    assert (row["first ms"], row["second ms"], row["ms"]) == (5000.0, 250.0, 250.0)
    heavy = slow(2.0, 2.0)
    seen = len(bench.wall({"heavy": heavy}, runs=15, seconds=1.5))
    before = clock[0]
    bench.wall({"heavy": heavy}, runs=15, seconds=1.5)
    assert (seen, clock[0] - before) == (1, 2.0), "what takes long is measured once"


def test_memory_beyond_inputs_and_result(monkeypatch):
    peak = 10_000
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    one = torch.zeros(1000, dtype=torch.bfloat16)
    bench = timing.Bench("cuda:0", 1 << 18, 1)
    assert calls.peak(bench, lambda: {"w": one}, [{"w": one}, {"w": one}]) == peak - 6000
    assert calls.peak(bench, lambda: one, [one]) == peak - 4000


def test_a_profile_is_kernels_over_the_time_of_the_call(monkeypatch):
    events = [
        {"ph": "X", "cat": "kernel", "name": "count_kernel", "dur": 400.0},
        {"ph": "X", "cat": "kernel", "name": "consensus_kernel", "dur": 900.0},
        {"ph": "X", "cat": "kernel", "name": "count_kernel", "dur": 200.0},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "dur": 3.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9000.0},
        {"ph": "i", "cat": "kernel", "name": "mark"},
        {"name": "process_name"},
    ]
    monkeypatch.setattr(profiled, "traced", lambda bench, work: ({"traceEvents": events}, 0.004))
    row = profiled.row(timing.Bench("cpu", 1, 1), dict, timing.Times.of([0.002, 0.002, 0.002]))
    assert (row["share"], row["kernels ms"], row["launches"], row["copies and fills"]) == (0.75, 1.5, 3, 1)
    assert [(e["name"], e["times"], e["ms"]) for e in row["device"]][:2] == [
        ("consensus_kernel", 1, 0.9), ("count_kernel", 2, 0.6)
    ]  # fmt: skip
    assert "name consensus_kernel what kernel times 1 ms 0.9, name count_kernel" in table.cell(row["device"])


def test_torch_peers_agree_with_the_call():
    bench = timing.Bench("cpu", 1 << 18, 1, 0)
    for name in ("ties", "ties 4.5B", "slerp", "slerp 4.5B", "linear", "linear 4.5B"):
        chosen = calls.CALLS[name]
        inputs = chosen.inputs(bench, "random")
        pairs = [chosen.ours(inputs)(), calls.peer_of(bench, chosen, "eager")(inputs)]
        one, other = (x if isinstance(x, dict) else {"w": x} for x in pairs)
        assert list(one) == list(other)
        differ = sum(int((one[k] != other[k]).sum()) for k in one) / sum(x.numel() for x in one.values())
        assert differ < 0.01, (name, differ)
    with pytest.raises(Absent, match="no such merge"):
        calls.peer_of(bench, calls.CALLS["dare_linear keep"], "mergekit")


def test_the_budget_begins_with_the_command(tmp_path, monkeypatch):
    machine = Machine(tmp_path, monkeypatch, USUAL)
    assert machine.call(budget=40, spent=39) == sum(map(len, USUAL.values()))
    assert not machine.log
