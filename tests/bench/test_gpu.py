"""``make gpu`` without a GPU: a dry run of every part, killed and continued; the table; what is missing is said."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the GPU benches need torch")
pytest.importorskip("triton", reason="the GPU benches need triton")

from bench import clock
from bench.gpu import bars, data, merges, runner, sanitize, table, timing
from bench.gpu.build import packages
from bench.gpu.plan import PARTS, Absent, Context, Item, items
from bench.gpu.state import IDENTITY, State

ROOT = Path(__file__).resolve().parents[2]
FACTS = dict.fromkeys(IDENTITY, "x") | {"dry": False, "date": "today", "command": "make gpu", "gpu": "H200"}


def context(path, **words):
    return Context(**{"dry": True, "wheels": None, "cache": str(path), **words})


def command(path, *words):
    stub = path / "stub" / "mergekit"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "__init__.py").write_text("raise ImportError('not here')\n")
    where = ["--results", str(path / "results"), "--cache", str(path / "cache")]
    env = {**os.environ, "PYTHONPATH": str(stub.parent)}
    return {"args": [sys.executable, "-m", "bench.gpu", *where, *words], "cwd": ROOT, "env": env}


def saved(path):
    files = list((path / "results").glob("gpu-*.json"))
    return json.loads(files[0].read_text()) if files else {"results": {}}


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A dry run that is killed after some items, then continued by the same command."""
    path = tmp_path_factory.mktemp("dry")
    child = subprocess.Popen(**command(path, "--dry"), stdout=subprocess.DEVNULL)
    while len(saved(path)["results"].get("build", {})) < 2 and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = saved(path)
    done = subprocess.run(**command(path, "--dry"), capture_output=True, text=True, check=False)
    return path, before, done


def test_a_killed_run_continues_and_every_part_runs(dry):
    path, before, done = dry
    assert done.returncode == 0, done.stdout + done.stderr
    after = saved(path)
    assert before["results"]
    assert not before["finished"]
    assert after["finished"]
    for part, entries in before["results"].items():
        for name, entry in entries.items():
            assert after["results"][part][name] == entry
            assert f"{part}: {name}\n" not in done.stdout
    assert list(after["results"]) == list(PARTS)
    for part in PARTS:
        assert list(after["results"][part]) == [i.name for i in items(part, context(path / "cache"))]
    assert not [e for some in after["results"].values() for e in some.values() if e["status"] == "failed"]
    assert len(after["facts"]["commands"]) == 2


def test_what_is_absent_is_said_and_the_table_has_every_row(dry):
    path, _, _ = dry
    after = saved(path)["results"]
    assert after["calls"]["ties mergekit"]["status"] == "absent"
    assert "not here" in after["calls"]["ties mergekit"]["reason"]
    assert after["merges"]["same bytes ties"]["row"]["devices"] == "cuda:0 = cuda:0,cuda:0 = cpu"
    (page,) = (path / "results").glob("gpu-*.md")
    text = page.read_text()
    assert "Nothing here is a measurement" in text
    for part, entries in after.items():
        assert f"## {part}: " in text
        assert all(f"\n| {name} |" in text for name in entries)
    assert all(bar.text in text for bar in bars.BARS)


def test_the_next_command_begins_anew(dry):
    path, _, _ = dry
    words = ["--dry", "--parts", "build", "--budget", "0"]
    done = subprocess.run(**command(path, *words), capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "the same command continues" in done.stdout
    assert len(list((path / "results").glob("gpu-*.json"))) == 2


def test_results_that_came_to_another_machine_do_not_stand_for_a_build(tmp_path):
    words = ["--dry", "--parts", "build", "--budget"]
    for cache, budget, want in (("one", 12, 3), ("one", 0, 3), ("two", 0, 3)):
        done = subprocess.run(**command(tmp_path, *words, str(budget), "--cache", str(tmp_path / cache)),
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == want, done.stdout + done.stderr
        kept = [*saved(tmp_path)["results"].get("build", {})]
        assert kept == ([] if cache == "two" else ["packages"])


def test_without_a_gpu_one_line_and_a_status(tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text("raise ImportError('no torch')\n")
    done = subprocess.run(**command(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.splitlines() == ["make gpu: no usable GPU here: torch cannot be imported: no torch"]
    assert not (tmp_path / "results").exists()


def test_the_run_itself_needs_the_standard_library_alone(tmp_path):
    """What it lacks is what it is to install: it starts, lists every item and writes its page without any package."""
    code = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {*sys.stdlib_module_names, "bench"}:
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Block())
sys.argv[0] = "bench.gpu"
runpy.run_module("bench.gpu", run_name="__main__", alter_sys=True)
"""
    words = command(tmp_path, "--dry", "--budget", "0")
    words["args"][1:3] = ["-c", code]
    done = subprocess.run(**words, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert f"merges ({len(items('merges', context(tmp_path)))})" in done.stdout
    assert list((tmp_path / "results").glob("gpu-*.md"))


def test_kinds_of_data():
    for kind in data.KINDS:
        f = data.family("cpu", 1 << 16, 2, kind)
        delta = (f.tuned[1].float() - f.base.float()).abs().view(-1, data.ROW)
        rows = delta.mean(1)
        spread = float(rows.max() / rows.min())
        assert spread > 3 if kind == "rows" else spread < 1.5, (kind, spread)
    assert data.family("cpu", 5000, 1, "rows").n == 5000


def test_judged_merges_are_medians_of_five(tmp_path):
    every = items("merges", context(tmp_path, dry=False))
    by = {item.name: item for item in every}
    (bar,) = [bar for bar in bars.BARS if bar.part == "merges"]
    assert merges.RUNS == 5
    assert {by[name].run.args[-1] for name in bar.items} == {merges.RUNS}
    assert all(item.needs < item.limit <= 480 for item in every)  # one fits into a command's 540 seconds
    known = {part: {i.name for i in items(part, context(tmp_path, dry=False))} for part in PARTS}
    for bar in bars.BARS:
        assert {*bar.items, *(name for name, _ in bar.beside)} <= known[bar.part]


def test_what_takes_too_long_is_killed_and_what_dies_is_reported(tmp_path):
    def start():
        worker = runner.Worker(context(tmp_path))
        worker._fresh = False
        return worker

    worker = start()
    slow = Item("issue", dict)
    assert worker.perform("kernels", slow, 0.0) is None
    assert not worker.alive
    state = State.open(tmp_path, FACTS, fresh=False)
    worker = runner.Worker(context(tmp_path))
    answer = worker.perform("build", Item("nothing of that name", dict), 30)
    assert answer["status"] == "failed"
    assert "the process ended" in answer["reason"]
    assert runner.Run(["build"], context(tmp_path), state).work(0, 0) == 2


def test_runs_are_continued_only_where_they_measure_the_same(tmp_path):
    first = State.open(tmp_path, FACTS, fresh=False)
    first.record("kernels", "slerp", {"status": "ok", "row": {"share": 0.9}, "seconds": 1})
    assert State.open(tmp_path, FACTS, fresh=False).path == first.path
    assert State.open(tmp_path, FACTS, fresh=False).row("kernels", "slerp") == {"share": 0.9}
    assert State.open(tmp_path, FACTS, fresh=True).path != first.path
    for name in IDENTITY:
        assert State.open(tmp_path, {**FACTS, name: "other"}, fresh=False).results == {}
    for i, text in enumerate(("", '{"facts": {"gpu"', "[]", "{}", '{"facts": 1, "finished": false, "results": {}}')):
        (tmp_path / f"gpu-2{i}.json").write_text(text)
    (tmp_path / "gpu-3.json").write_bytes(b"\xff\xfe")
    assert State.open(tmp_path, FACTS, fresh=False).path == first.path, "what cannot be read is passed over"
    first.save(finished=True)
    assert State.open(tmp_path, FACTS, fresh=False).results == {}


def test_the_disk_is_probed_both_ways_and_the_faster_one_counts(tmp_path, monkeypatch):
    size = 3 * merges.BLOCK + 5000
    for direct in (False, True):
        took = merges.write_file(tmp_path / "zeros", size, direct=direct)
        assert took is None or took > 0
        assert not list(tmp_path.iterdir())
    opened = os.open

    def refuse(path, flags, mode=0o777):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return opened(path, flags, mode)

    with monkeypatch.context() as here:
        here.setattr(merges.os, "open", refuse)
        assert merges.write_file(tmp_path / "zeros", size, direct=True) is None
    monkeypatch.setattr(merges, "write_file", lambda path, nbytes, *, direct: 0.25 if direct else 0.75)
    monkeypatch.setattr(merges, "read_files", lambda files: 0.125)
    row = merges.speed(context(tmp_path), "ties", "cpu", "warm", 1)
    assert row["slowest"] == "write past cache"
    assert (row["write s"][:5], row["write past cache s"][:5]) == ("0.750", "0.250")
    monkeypatch.setattr(merges, "write_file", lambda path, nbytes, *, direct: None if direct else 0.75)
    row = merges.speed(context(tmp_path), "ties", "cpu", "warm", 1)
    assert row["slowest"] == "write"
    assert "write past cache s" not in row


def test_verdicts(tmp_path):
    state = State.open(tmp_path, FACTS, fresh=False)

    def ok(part, item, **row):
        state.record(part, item, {"status": "ok", "row": row, "seconds": 1})

    ok("kernels", "slerp", share=0.81, **{"gram share": 0.87})
    ok("kernels", "ties N=2", share=0.9)
    ok("kernels", "dare N=2", share=0.79)
    ok("kernels", "batch combine", times=1.01)
    ok("kernels", "batch ties", times=1.16)
    for kind in data.KINDS:
        ok("kernels", f"select N=2 {kind}", share=0.82)
        ok("calls", f"ties {kind}", ms=1.95 if kind == "rows" else 1.8, beyond=0.01)
    ok("calls", "ties mergekit", **{"times faster": 18.5})
    ok("calls", "profile ties", share=0.9)
    ok("kernels", "replicate E=8 clean", **{"written share": 0.79, "read and written share": 0.945})
    ok("tests", "one", tests=3)
    state.record("sanitize", "memcheck extension", {"status": "absent", "reason": "refused"})
    ok("merges", "same bytes ties")
    state.record("merges", "same bytes slerp", {"status": "failed", "reason": "different bytes"})
    by = {row["bar"]: row for row in bars.judge(state)}

    def verdict(words):
        (row,) = [row for bar, row in by.items() if words in bar]
        return row["verdict"], row["measured"]

    assert verdict("slerp, both") == ("pass", 0.81)
    assert verdict("gram, of") == ("fail", 0.87)
    assert verdict("ties merge") == ("not run", 0.9)
    assert verdict("dare N=2") == ("fail", 0.79)
    assert verdict("select, its one counting read") == ("not run", 0.82)
    assert verdict("replication, bytes") == ("fail", 0.79)
    assert verdict("ties, ms on other") == ("fail", 1.95)
    assert by["ties, ms"]["verdict"] == "pass"
    assert verdict("ties, times faster than mergekit") == ("pass", 18.5)
    assert verdict("ties 4.5B, times faster") == ("not run", None)
    assert verdict("of the time of a call") == ("not run", 0.9)
    assert verdict("device memory beyond") == ("not run", 0.01)
    (details,) = [row["details"] for bar, row in by.items() if "replication, bytes" in bar]
    assert "read and written share 0.945" in details
    assert verdict("8B tensors") == ("fail", 1.16)
    assert verdict("marked gpu") == ("pass", "1 of 1")
    assert verdict("compute-sanitizer") == ("not run", "0 of 1")
    assert verdict("same bytes") == ("fail", "1 of 2")
    assert "refused" in table.page(state, "merges (3)")


@pytest.mark.parametrize(
    ("printed", "status", "want"),
    [
        ("driven: some\n========= ERROR SUMMARY: 0 errors", 0, "driven"),
        ("driven: some\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "driven"),
        ("absent: the extension was built without CUDA", 0, Absent),
        ("========= Error: Device not supported. Please refer to the manual", 1, Absent),
        ("========= Unable to attach", 1, AssertionError),
        ("========= Error: Failed to initialize", 1, AssertionError),
        ("RuntimeError: Unable to find it\n  Unable to go on\n========= ERROR SUMMARY: 0 errors", 1, AssertionError),
        ("driven: some\n========= ERROR SUMMARY: 2 errors", 86, AssertionError),
        ("========= ERROR SUMMARY: 0 errors", 1, AssertionError),
    ],
)
def test_what_the_sanitizer_says(tmp_path, monkeypatch, printed, status, want):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{printed}\nEND\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if isinstance(want, str):
        assert want in sanitize.check("memcheck", "extension", context(tmp_path))
    else:
        with pytest.raises(want):
            sanitize.check("memcheck", "extension", context(tmp_path))


def test_the_device_is_busy_until_the_host_has_issued(monkeypatch):
    """The CUDA half of the timer, on a clock of our own: a host that takes 2 ms to issue 5 ms of work."""
    torch = pytest.importorskip("torch")
    now = {"host": 0.0, "device": 0.0, "slept": []}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now["device"] = max(now["device"], now["host"])

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    def synchronize():
        now["host"] = now["device"] = max(now["device"], now["host"])

    def sleep(cycles):
        now["slept"].append(cycles / clock.CYCLES)
        now["device"] += cycles / clock.CYCLES

    def work():
        now["host"] += 2e-3
        now["device"] = max(now["device"], now["host"]) + 5e-3

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now["host"])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    found = timing.Bench("cuda:0", 1 << 20, 4).alternate({"one": work, "two": work})
    assert found["one"].median == pytest.approx(5e-3)
    assert found["two"].most == pytest.approx(5e-3)
    assert len(now["slept"]) == 2 * (4 + 2)
    assert now["slept"][-1] == pytest.approx(3 * 2e-3 + 2e-4)


def test_instructions_are_counted_in_machine_code():
    """As on a GPU, but for the launch: what is compiled for sm_90 agrees with the committed table.

    By a tenth: the table may count the search of a block's segment otherwise.
    """
    code = """
import json, os, torch
os.environ.pop("TRITON_INTERPRET", None)
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from tests.kernels.aot import TABLE, Driver
driver.set_active(Driver(90))
inner = JITFunction.run
JITFunction.run = lambda self, *a, grid, warmup, **k: inner(self, *a, grid=grid, warmup=True, **k)
from bench import calls
from bench.gpu import issue
from bench.gpu.data import family
from bench.gpu.spin import spin_kernel
from fastmerge.kernels._call import Gpu
from fastmerge.kernels.backend import TritonKernels
class Nothing:
    def __getitem__(self, grid):
        return lambda *args: None
class Compiler(Gpu):
    def compiled(self, launch):
        return super().compiled(launch) and Nothing()
kernels = object.__new__(TritonKernels)
kernels.device = torch.device("cpu")
kernels.gpu = Compiler(kernels.device)
found = issue.per_element(calls.combine(kernels, family("cpu", 65_536, 2), delta=False), "combine")
table = json.loads(TABLE.read_text())["per_element"]["combine bf16+bf16 to bf16 unmasked"]
assert abs(found - table) <= 0.1 * table, (found, table)
spin = spin_kernel[(4,)](torch.zeros(4096, dtype=torch.int32), issue.TRIPS, BLOCK=issue.BLOCK, num_warps=issue.WARPS)
each = issue.executed(issue.machine_code(spin.asm["cubin"]), issue.TRIPS)
assert 1.0 <= each / (issue.TRIPS * 64 * 2 * issue.BLOCK / (32 * issue.WARPS)) < 1.02, each
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_wheels_supply_what_is_missing(tmp_path):
    pytest.importorskip("pip")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, tag in (("fm_probe", "py3-none-any"), ("fm_other", "cp27-none-any"), ("click", "py3-none-any")):
        with zipfile.ZipFile(wheels / f"{name}-0.0-{tag}.whl", "w") as file:
            about = f"{name}-0.0.dist-info"
            file.writestr(f"{name}/__init__.py", "")
            file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0\n")
            file.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
            file.writestr(f"{about}/RECORD", f"{name}/__init__.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n")
    here = context(tmp_path, wheels=str(wheels))
    row = packages(here)
    assert row["installed"] == ["fm_probe-0.0-py3-none-any.whl"]
    assert row["refused"] == ["fm_other-0.0-cp27-none-any.whl"]
    assert (here.site / "fm_probe" / "__init__.py").exists()
